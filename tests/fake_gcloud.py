"""A scripted `gcloud`: records each argument list, keeps queued resources and objects in a folder, fails on demand.

    cloud = Cloud(folder)                    environment = cloud.install(folder / "bin", base environment)
    cloud.calls()                            argument lists so far, in order
    cloud.answer("compute tpus queued-resources describe", stderr="ERROR: ... UNAVAILABLE", code=1, times=2)
    cloud.set_state("run", "SUSPENDED")      what a preemption does, with the hook `gone`

Flags must be written --name=value. A created resource goes one state further each time that it is described or listed.
Hooks are executables in FOLDER/hooks: `active NODE`, `gone NODE`, `reset NODE`, once per node (slice), and
`ssh NODE WORKER COMMAND` for each worker; a worker that ends with 255 gets its command up to ten times, as from gcloud.
Objects lie in FOLDER/objects, or in the emulator that STORAGE_EMULATOR_HOST names.
"""

import contextlib
import datetime
import fcntl
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fake_objects import Failure, Objects, field, pairs

PATH_TO_ACTIVE = ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
DELETING_POLLS = 2
SSH_TRIES = 10
QUEUED = "compute tpus queued-resources"


class Cloud:
    """The state in a folder, shared by the test and by each call of the fake."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.hooks = self.folder / "hooks"
        self.hooks.mkdir(parents=True, exist_ok=True)

    def install(self, bin_folder: Path, base: dict[str, str]) -> dict[str, str]:
        """Puts `gcloud` into a folder; returns the environment with that folder first on PATH."""
        bin_folder.mkdir(parents=True, exist_ok=True)
        script = bin_folder / "gcloud"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{Path(__file__).resolve()}" "$@"\n')
        script.chmod(0o755)
        return {**base, "PATH": f"{bin_folder}:{base['PATH']}", "FAKE_GCLOUD": str(self.folder)}

    @contextlib.contextmanager
    def state(self) -> Iterator[dict[str, Any]]:
        """The whole state, to read and to change, while nobody else does."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self.folder / "cloud.json"
            found = json.loads(file.read_text()) if file.exists() else {
                "resources": {}, "answers": [], "path": PATH_TO_ACTIVE, "deleting_polls": DELETING_POLLS,
                "workers": 1, "now": "2026-01-01T00:00:00Z", "generations": {}}
            try:
                yield found
            finally:
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(found, indent=1))
                partial.replace(file)

    def calls(self) -> list[list[str]]:
        """Argument lists, without `gcloud`, in the order in which they came."""
        return [call["argv"] for call in self.records()]

    def records(self) -> list[dict[str, Any]]:
        """The same with `files`, the text of each --metadata-from-file, and `code`, how the call ended."""
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def answer(self, command: str, *, stdout: str = "", stderr: str = "", code: int = 0, times: int = -1) -> None:
        """Calls that begin with `command` (words; * and ? match) end like this, `times` times (-1: always).

        A code above 255 lets the command run first and then ends with the code - 256: a reply that got lost.
        """
        with self.state() as state:
            state["answers"].append({"command": command, "stdout": stdout, "stderr": stderr, "code": code,
                                     "times": times})

    def resources(self) -> dict[str, str]:
        """ZONE/NAME -> state of what exists; a name that costs money is anything but absent."""
        with self.state() as state:
            return {key: found["state"]["state"] for key, found in state["resources"].items()}

    def set_state(self, name: str, value: str) -> None:
        """Moves a resource (in whichever zone) into a state; one that was ACTIVE loses its hosts."""
        with self.state() as state:
            key = next(key for key in state["resources"] if key.endswith(f"/{name}"))
            found = state["resources"][key]
            was, found["state"]["state"] = found["state"]["state"], value
            found["path"] = []
        if was == "ACTIVE" and value != "ACTIVE":
            self.run_hook("gone", found)
        if value == "ACTIVE" and was != "ACTIVE":
            self.run_hook("active", found)

    def run_hook(self, hook: str, resource: dict[str, Any]) -> None:
        if (self.hooks / hook).exists():
            for node in nodes_of(resource):
                subprocess.run([self.hooks / hook, node], check=True)


def nodes_of(resource: dict[str, Any]) -> list[str]:
    """Names of the slices of a queued resource."""
    spec = resource["tpu"]["nodeSpec"][0]
    several = spec.get("multisliceParams")
    if not several:
        return [spec["nodeId"]]
    return [f"{several['nodeIdPrefix']}-{number}" for number in range(several["nodeCount"])]


class Call:
    """One call of the fake: its words, its flags, and what it says and does."""

    def __init__(self, cloud: Cloud, argv: list[str]) -> None:
        self.cloud = cloud
        self.argv = argv
        plain = argv[: argv.index("--")] if "--" in argv else argv
        self.words = [word for word in plain if not word.startswith("--")]
        given = (word[2:].partition("=") for word in plain if word.startswith("--"))
        self.flags = {name: value for name, _, value in given}
        if self.words[:1] in (["alpha"], ["beta"]):
            self.words = self.words[1:]
        self.after: list[Callable[[], object]] = []

    def run(self) -> int:
        forced = self._answer()
        try:
            code = 0
            if forced is None or forced["code"] > 255:
                self._dispatch()
            for action in self.after:
                action()
            if forced is not None:
                sys.stdout.write(forced["stdout"])
                sys.stderr.write(forced["stderr"])
                code = forced["code"] % 256
        except Failure as failure:
            print(f"ERROR: (gcloud.{'.'.join(self.words[:4])}) {failure}", file=sys.stderr)
            code = failure.code
        self._record(code)
        return code

    def _record(self, code: int) -> None:
        given = pairs(self.flags.get("metadata-from-file", ""))
        files = {key: Path(path).read_text() for key, path in given.items() if Path(path).exists()}
        with open(self.cloud.folder / "calls.jsonl", "a") as log:
            log.write(json.dumps({"argv": self.argv, "files": files, "code": code}) + "\n")

    def _answer(self) -> dict[str, Any] | None:
        with self.cloud.state() as state:
            for rule in state["answers"]:
                pattern = rule["command"].split()
                words = self.words[: len(pattern)]
                if rule["times"] and len(words) == len(pattern) and all(map(fnmatch.fnmatch, words, pattern)):
                    rule["times"] -= 1
                    return rule
        return None

    def _dispatch(self) -> None:
        for command, method in COMMANDS.items():
            words = command.split()
            if self.words[: len(words)] == words:
                self.rest = self.words[len(words):]
                method(self)
                return
        raise Failure(f"fake: no answer is scripted for: {' '.join(self.words)}", 2)

    # Queued resources.

    def _key(self) -> str:
        if not self.rest or "zone" not in self.flags:
            raise Failure("argument QUEUED_RESOURCE, --zone: Must be specified.", 2)
        return f"{self.flags['zone']}/{self.rest[0]}"

    def _found(self, state: dict[str, Any]) -> dict[str, Any]:
        if (key := self._key()) not in state["resources"]:
            zone, name = key.split("/")
            raise Failure(f"NOT_FOUND: Resource 'projects/{self.flags.get('project', '-')}/locations/{zone}/"
                          f"queuedResources/{name}' was not found")
        return state["resources"][key]

    def create(self) -> None:
        with self.cloud.state() as state:
            key = self._key()
            zone, name = key.split("/")
            full = f"projects/{self.flags.get('project', '-')}/locations/{zone}/queuedResources/{name}"
            if key in state["resources"]:
                raise Failure(f"ALREADY_EXISTS: Resource '{full}' already exists")
            spec: dict[str, Any] = {"node": {"acceleratorType": self.flags["accelerator-type"],
                                             "labels": pairs(self.flags.get("labels", "")),
                                             "metadata": pairs(self.flags.get("metadata", "")),
                                             "runtimeVersion": self.flags["runtime-version"]}}
            if "node-count" in self.flags:
                spec["multisliceParams"] = {"nodeCount": int(self.flags["node-count"]),
                                            "nodeIdPrefix": self.flags.get("node-prefix", name)}
            else:
                spec["nodeId"] = self.flags["node-id"]
            found: dict[str, Any] = {
                     "name": full, "createTime": state["now"] or now(), "state": {"state": state["path"][0]},
                     "tpu": {"nodeSpec": [spec]}, "path": state["path"][1:],
                     **{key: {} for key in ("spot", "guaranteed") if key in self.flags}}
            state["resources"][key] = found
        if found["state"]["state"] == "ACTIVE":
            self.after.append(lambda: self.cloud.run_hook("active", found))

    def _advance(self, state: dict[str, Any], key: str) -> None:
        """One look at a resource: it is one state further."""
        found = state["resources"][key]
        if found["state"]["state"] == "DELETING":
            found["polls"] -= 1
            if found["polls"] < 0:
                del state["resources"][key]
        elif found["path"]:
            found["state"]["state"] = found["path"].pop(0)
            if found["state"]["state"] == "ACTIVE":
                self.after.append(lambda: self.cloud.run_hook("active", found))

    def describe(self) -> None:
        with self.cloud.state() as state:
            self._found(state)
            self._advance(state, self._key())
            found = self._found(state)
        self._print([found], many=False)

    def list_all(self) -> None:
        with self.cloud.state() as state:
            zone = self.flags.get("zone", "")
            for key in [key for key in state["resources"] if key.startswith(f"{zone}/")]:
                self._advance(state, key)
            found = [value for key, value in state["resources"].items() if key.startswith(f"{zone}/")]
        self._print(found, many=True)

    def delete(self) -> None:
        with self.cloud.state() as state:
            found = self._found(state)
            was = found["state"]["state"]
            if was in ("ACTIVE", "SUSPENDED", "PROVISIONING") and "force" not in self.flags:
                raise Failure("FAILED_PRECONDITION: the queued resource still has nodes; delete them, or use --force")
            if was != "DELETING":
                found.update(state={"state": "DELETING"}, path=[], polls=state["deleting_polls"])
        if was == "ACTIVE":
            self.after.append(lambda: self.cloud.run_hook("gone", found))

    def reset(self) -> None:
        with self.cloud.state() as state:
            found = self._found(state)
            if found["state"]["state"] != "ACTIVE":
                raise Failure("FAILED_PRECONDITION: only an ACTIVE queued resource can be reset")
        self.after.append(lambda: self.cloud.run_hook("reset", found))

    # Nodes.

    def _nodes(self) -> list[dict[str, Any]]:
        with self.cloud.state() as state:
            zone = self.flags.get("zone", "")
            return [{"name": f"projects/{self.flags.get('project', '-')}/locations/{zone}/nodes/{node}",
                     "state": "READY", "networkEndpoints": [{"ipAddress": f"10.0.0.{worker + 2}"}
                                                            for worker in range(state["workers"])]}
                    for key, found in state["resources"].items() if key.startswith(f"{zone}/")
                    and found["state"]["state"] == "ACTIVE" for node in nodes_of(found)]

    def node_list(self) -> None:
        self._print(self._nodes(), many=True)

    def _node(self) -> dict[str, Any]:
        name = self.rest[0].split("@")[-1]
        for node in self._nodes():
            if node["name"].endswith(f"/{name}"):
                return node
        raise Failure(f"NOT_FOUND: Resource 'projects/{self.flags.get('project', '-')}/locations/"
                      f"{self.flags.get('zone')}/nodes/{name}' was not found")

    def node_describe(self) -> None:
        self._print([self._node()], many=False)

    def ssh(self) -> None:
        """The command on each worker; the first code that isn't 0 comes back, 255 makes it run again."""
        node = self._node()
        asked = self.flags.get("worker", "0")
        workers = range(len(node["networkEndpoints"])) if asked == "all" else [int(asked)]
        codes = []
        for worker in workers:
            for _ in range(SSH_TRIES):
                hook = [self.cloud.hooks / "ssh", node["name"].rsplit("/", 1)[1], str(worker),
                        self.flags.get("command", "")]
                code = subprocess.run(hook, check=False).returncode if hook[0].exists() else 0
                if code != 255:
                    break
            codes.append(code)
        if failed := [code for code in codes if code]:
            raise Failure(f"[/usr/bin/ssh] exited with return code [{failed[0]}].", failed[0])

    # Objects.

    def storage_cp(self) -> None:
        store, (source, target) = Objects(self.cloud.folder, self.cloud.state), self.rest
        if source.startswith("gs://"):
            data = store.get(source)
        else:
            data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        if not target.startswith("gs://"):
            if target == "-":
                sys.stdout.buffer.write(data)
            else:
                Path(target).write_bytes(data)
            return
        target = target + Path(source).name if target.endswith("/") else target
        match = self.flags.get("if-generation-match")
        if "no-clobber" in self.flags and store.generation(target):
            return
        store.put(target, data, None if match is None else int(match))
        if "print-created-message" in self.flags:
            print(f"Created: {target}#{store.generation(target)}", file=sys.stderr)

    def storage_cat(self) -> None:
        store = Objects(self.cloud.folder, self.cloud.state)
        for pattern in self.rest:
            names = fnmatch.filter(store.list(pattern.split("*")[0]), pattern) if "*" in pattern else [pattern]
            if not names:
                raise Failure(f"The following URLs matched no objects or files:\n{pattern}")
            for name in sorted(names):
                start, _, last = self.flags.get("range", "0-").partition("-")
                sys.stdout.buffer.write(store.get(name)[int(start): int(last) + 1 if last else None])

    def storage_ls(self) -> None:
        prefix, store = self.rest[0], Objects(self.cloud.folder, self.cloud.state)
        found = [name for name in store.list(prefix.split("*")[0])
                 if name == prefix or fnmatch.fnmatchcase(name, prefix if "*" in prefix else prefix.rstrip("/") + "/*")]
        if not found:
            raise Failure("One or more URLs matched no objects.")
        for name in sorted(found):
            print(f"{len(store.get(name)):>10}  2026-01-01T00:00:00Z  {name}" if "long" in self.flags else name)

    def storage_rm(self) -> None:
        store, match = Objects(self.cloud.folder, self.cloud.state), self.flags.get("if-generation-match")
        for pattern in self.rest:
            names = [pattern]
            if "*" in pattern or "recursive" in self.flags:
                names = [name for name in store.list(pattern.split("*")[0].rstrip("/"))
                         if "recursive" in self.flags or fnmatch.fnmatchcase(name, pattern)]
            for name in names:
                store.delete(name, None if match is None else int(match))

    def object_describe(self) -> None:
        generation = Objects(self.cloud.folder, self.cloud.state).generation(self.rest[0])
        if not generation:
            raise Failure(f"{self.rest[0]} not found: 404.")
        self._print([{"name": self.rest[0].split("/", 3)[3], "generation": str(generation)}], many=False)

    # What --format asks for: json, or value(a.b,c.d).

    def _print(self, found: list[dict[str, Any]], *, many: bool) -> None:
        wanted = self.flags.get("format", "json")
        if wanted == "json":
            plain = [{key: value for key, value in item.items() if key not in ("path", "polls")} for item in found]
            print(json.dumps(plain if many else plain[0], indent=1))
            return
        kind, _, fields = wanted.removesuffix(")").partition("(")
        if kind != "value":
            raise Failure(f"fake: --format={wanted} isn't known", 2)
        for item in found:
            print("\t".join(str(field(item, path.strip())) for path in fields.split(",")))


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


COMMANDS: dict[str, Callable[[Call], None]] = {
    f"{QUEUED} create": Call.create,
    f"{QUEUED} describe": Call.describe,
    f"{QUEUED} list": Call.list_all,
    f"{QUEUED} delete": Call.delete,
    f"{QUEUED} reset": Call.reset,
    "compute tpus tpu-vm list": Call.node_list,
    "compute tpus tpu-vm describe": Call.node_describe,
    "compute tpus tpu-vm ssh": Call.ssh,
    "storage cp": Call.storage_cp,
    "storage cat": Call.storage_cat,
    "storage ls": Call.storage_ls,
    "storage rm": Call.storage_rm,
    "storage objects describe": Call.object_describe,
}


if __name__ == "__main__":
    sys.exit(Call(Cloud(Path(os.environ["FAKE_GCLOUD"])), sys.argv[1:]).run())
