"""The ways a command may end badly; each becomes one line and an exit code."""

import errno
import re
import sys
import traceback

OURS = 70
"""Exit code of an error that isn't the user's: a restart may help."""
INTERRUPTED = 130
REFUSALS = (
    (r"Forbidden: |PERMISSION_DENIED",
     "no permission for this; give the account the role Storage Object Admin on the bucket, or name another bucket"),
    (r"UNAUTHENTICATED|, 401$|Invalid Credentials|DefaultCredentialsError|invalid_grant",
     "no valid credentials; `gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS=FILE"),
)
"""What the clients of gs://, gcsfs, google-auth and TensorStore, each say in their own words, and what it means."""


class UserError(Exception):
    """A mistake that the user can mend: the message names the field or file, its value, the rule, the way out."""

    exit_code = 1


class FatalError(UserError):
    """A state that a restart of the same command can't help, such as a non-finite loss."""

    exit_code = 4


class HardwareError(UserError):
    """A device that computes or keeps something else than its copies; a restart, perhaps elsewhere, may help."""

    exit_code = 71


class RestartError(UserError):
    """What the same command may get past later: storage that refuses in mid-run, a folder that another one holds."""

    exit_code = 75


def first_line(error: BaseException, length: int = 200) -> str:
    """Of a message that goes on, with the places in a library's source; the type's name where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]


def reason(error: BaseException) -> str:
    """What an error says, without the number and the file's name that an OSError has around it."""
    return "no such file" if isinstance(error, FileNotFoundError) else str(getattr(error, "strerror", None) or error)


def install(name: str) -> str:
    """The command that installs requirements/NAME.txt of the checkout: the versions that were tested together."""
    checks = "" if name == "torch" else "--no-deps --require-hashes "
    return f"pip install {checks}-r requirements/{name}.txt"


def counted(number: int, noun: str) -> str:
    """1 input, 2 inputs."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def refusal(error: BaseException) -> str | None:
    """What it means, and the way out, of an error of gs:// that no restart helps; None of any other."""
    said = f"{type(error).__name__}: {error}"
    return next((line for pattern, line in REFUSALS if re.search(pattern, said)), None)


def explain(command: str, error: BaseException) -> int:
    """Says on stderr how a command ended; returns its exit code."""
    if isinstance(error, UserError):
        print(f"crystal-jax {command}: {error}".replace(" :", ":", 1), file=sys.stderr)
        return error.exit_code
    if isinstance(error, BrokenPipeError) and command != "train":
        # `crystal-jax ... | head` closed our output: nothing is left to say.
        sys.stderr.close()
        return 0
    if isinstance(error, KeyboardInterrupt):
        print(f"crystal-jax {command}: interrupted; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(f"crystal-jax {command}: {error.filename or 'the output'}: no space left on the device; what was "
              "finished is whole: free some space and give the same command again", file=sys.stderr)
        return UserError.exit_code
    if line := refusal(error):
        said = " ".join(str(error).split())[:200]
        print(f"crystal-jax {command}: gs://: {line} ({said})", file=sys.stderr)
        return UserError.exit_code
    traceback.print_exception(error)
    return OURS
