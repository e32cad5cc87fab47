"""Runs one untrusted Python program, cut off from files, network, other processes and memory: python -I sandbox.py.

A warden process reads a job from its standard input, runs the program in a child and prints the verdict. What holds the
child: Landlock (files, TCP, signals), a seccomp filter (no socket, no signal, no other process or program), no
capabilities, resource limits, an empty environment, and a folder that is watched and removed. The warden adopts what
the program leaves behind and kills it. Standard library only, so that it starts in milliseconds.

The one invariant: "passed" means that the program ran to its end. The child says so with a random word on a pipe, so
that no way of exiting early, no output and no exit code can be taken for it. (A program that searches its own process
for the word could forge it: what a generated program says of itself is no proof against one that sets out to cheat.)
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import secrets
import selectors
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

POLL_SECONDS = 0.02
MAX_PROCESSES = 32
MAX_FOLDER = 64 << 20
"""Bytes of all files that a program may have at one time."""
ANSWER_BYTES = 200
FAILED = "failed "
FILE_BYTES = 32 << 20

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38

# Landlock, by the version of its interface that knows them: include/uapi/linux/landlock.h.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
READ_RIGHTS = 1 << 0 | 1 << 2 | 1 << 3
"""Execute, read a file, list a folder."""
TCP_RIGHTS, TCP_VERSION = 0b11, 4
SCOPES, SCOPE_VERSION = 0b11, 6
"""Abstract unix sockets and signals to processes outside."""

# System calls that a program of one process has no use for, by architecture (uapi/asm/unistd): socket, ptrace, kill,
# tkill, tgkill, process_vm_readv, process_vm_writev, bpf, perf_event_open, userfaultfd, add_key, keyctl, unshare,
# mount, setns, io_uring_setup, pidfd_open, pidfd_send_signal, execve, execveat and, where they exist, fork and vfork.
FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 101, 62, 200, 234, 310, 311, 321, 298, 323, 248, 250, 272, 165, 308, 425, 434, 424,
                            59, 322, 57, 58)),
    "aarch64": (0xC00000B7, (198, 117, 129, 130, 131, 270, 271, 280, 241, 282, 217, 219, 97, 40, 268, 425, 434, 424,
                             221, 281)),
}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3, CLONE_THREAD = 435, 0x10000
X32 = 0x40000000
"""Bit of system calls of the x32 interface, which have other numbers."""


def landlock_version() -> int:
    """Of the kernel's Landlock interface, 0 where it has none."""
    return max(LIBC.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1), 0)


def layers() -> dict[str, bool]:
    """What this machine can hold a program with."""
    version = landlock_version()
    return {
        "landlock files": version >= 1,
        "landlock tcp": version >= TCP_VERSION,
        "landlock signals": version >= SCOPE_VERSION,
        "seccomp": platform.machine() in FORBIDDEN and sys.platform == "linux",
        "resource limits": True,
        "no capabilities": sys.platform == "linux",
    }


def readable() -> list[str]:
    """What the interpreter itself needs: its files, the system's libraries, two devices."""
    found = {sys.base_prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache",
             "/dev/null", "/dev/urandom", "/dev/zero"}
    return sorted(path for path in {os.path.realpath(path) for path in found} if os.path.exists(path))


def restrict_files(folder: str) -> None:
    """Landlock: reading is left for `readable`, everything for `folder`."""
    version = landlock_version()
    rights = sum(bits for since, bits in FILE_RIGHTS.items() if version >= since)
    attributes = struct.pack("QQQ", rights, TCP_RIGHTS if version >= TCP_VERSION else 0,
                             SCOPES if version >= SCOPE_VERSION else 0)
    size = 24 if version >= SCOPE_VERSION else 16 if version >= TCP_VERSION else 8
    ruleset = _checked(LIBC.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    for path, allowed in [*((path, READ_RIGHTS) for path in readable()), (folder, rights)]:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            allowed &= ~(1 << 3)
        _checked(LIBC.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, handle), 0))
        os.close(handle)
    _checked(LIBC.syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def restrict_calls() -> None:
    """seccomp: the forbidden system calls answer "not permitted", and only threads can be made."""
    load, equal, any_bit, at_least, give = 0x20, 0x15, 0x45, 0x35, 0x06
    refused, unknown, allowed = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x7FFF0000
    number_at, architecture_at, flags_at = 0, 4, 16
    architecture, numbers = FORBIDDEN[platform.machine()]
    program = [(load, 0, 0, architecture_at), (equal, 1, 0, architecture), (give, 0, 0, refused),
               (load, 0, 0, number_at), (at_least, 0, 1, X32), (give, 0, 0, refused)]
    for number in numbers:
        program += [(equal, 0, 1, number), (give, 0, 0, refused)]
    # The C library falls back from clone3, whose flags a filter can't see, to clone.
    program += [(equal, 0, 1, CLONE3), (give, 0, 0, unknown), (equal, 0, 3, CLONE[platform.machine()]),
                (load, 0, 0, flags_at), (any_bit, 1, 0, CLONE_THREAD), (give, 0, 0, refused), (give, 0, 0, allowed)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _checked(LIBC.prctl(PR_SET_SECCOMP, 2, header, 0, 0))


def drop_capabilities() -> None:
    """What root may do beyond others; no program can be executed that would give it back."""
    version_3, nothing = 0x20080522, 0
    _checked(LIBC.capset(struct.pack("=Ii", version_3, 0), struct.pack("=6I", *[nothing] * 6)))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def limit(job: dict[str, Any]) -> None:
    """Resource limits of this process and all that it starts."""
    processor = int(job["seconds"]) + 1
    for what, value in ((resource.RLIMIT_CPU, processor), (resource.RLIMIT_AS, job["memory"]),
                        (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_STACK, 64 << 20), (resource.RLIMIT_NPROC, _threads() + MAX_PROCESSES)):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _threads() -> int:
    """Of this user, which the kernel's limit on processes counts too."""
    count, me = 0, os.getuid()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == me:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def run_child(job: dict[str, Any], folder: str, answer: int, word: str) -> None:
    """Never returns: holds itself, runs the program, says how it ended."""
    os.setsid()
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(folder)
    null = os.open("/dev/null", os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(null, handle)
    os.dup2(answer, 3)
    os.closerange(4, 1 << 16)
    os.environ.clear()
    os.environ.update({"HOME": folder, "TMPDIR": folder, "PATH": "", "LANG": "C.UTF-8"})
    tempfile.tempdir = folder
    program = job["program"]
    limit(job)
    drop_capabilities()
    _checked(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if "landlock files" in job["layers"]:
        restrict_files(folder)
    if "seccomp" in job["layers"]:
        restrict_calls()
    sys.argv = ["program"]
    sys.path = [path for path in sys.path if path.startswith(sys.base_prefix)]
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        # One write: what a program's own processes write after it comes behind it.
        os.write(3, (FAILED + said).encode(errors="replace")[:ANSWER_BYTES].ljust(len(word)))
        os._exit(1)
    os.write(3, word.encode())
    os._exit(0)


def descendants(root: int) -> list[int]:
    """Every live process below one, in no order."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(name))
    found, left = [], [root]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


def kill_all() -> None:
    """Stops, then kills, all that is below this process, until nothing is: a fork bomb doesn't outrun it."""
    while below := descendants(os.getpid()):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        _reap()
    _reap()


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def folder_bytes(folder: str) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


def watch(child: int, answer: int, job: dict[str, Any], folder: str, word: str) -> str:
    """How the program ended: passed, timed out, or failed with the reason."""
    said, end = b"", time.monotonic() + job["seconds"]
    with selectors.DefaultSelector() as ready:
        ready.register(answer, selectors.EVENT_READ)
        while time.monotonic() < end:
            if ready.select(POLL_SECONDS):
                part = os.read(answer, ANSWER_BYTES)
                said += part
                if not part or len(said) >= len(word):
                    break
            if os.waitpid(child, os.WNOHANG)[0]:
                said += os.read(answer, ANSWER_BYTES) if ready.select(0) else b""
                break
            if folder_bytes(folder) > MAX_FOLDER:
                return f"failed: more than {MAX_FOLDER >> 20} MiB of files"
            if len(descendants(os.getpid())) > MAX_PROCESSES:
                return f"failed: more than {MAX_PROCESSES} processes"
        else:
            return "timed out"
    text = said.decode(errors="replace")
    if text.startswith(word):
        return "passed"
    return f"failed: {text[len(FAILED):].rstrip()}" if text.startswith(FAILED) else "failed: ended early"


@contextlib.contextmanager
def _clean_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="crystal-sandbox-")
    try:
        yield folder
    finally:
        kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def stop(*_: Any) -> None:
    raise SystemExit(1)


def main() -> None:
    """One job {"program", "seconds", "memory", "layers"} in, one verdict {"result", "seconds"} out, both JSON."""
    job = json.load(sys.stdin)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Whoever started the warden may be killed: then it is told, and clears up.
    signal.signal(signal.SIGTERM, stop)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    word, began = secrets.token_hex(16), time.monotonic()
    with _clean_folder() as folder:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                run_child(job, folder, write, word)
            finally:
                os._exit(70)
        os.close(write)
        result = watch(child, read, job, folder, word)
    print(json.dumps({"result": result, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
