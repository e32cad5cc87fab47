"""Reading configs/*.py with overrides from the command line: `--config=FILE[:VARIANT] --config.a.b=VALUE`."""

import dataclasses
import sys
import warnings
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from crystal_jax import config
from crystal_jax.config import Config, nearest, validate
from crystal_jax.errors import UserError


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """The validated Config that `get_config` of the file returns, with overrides such as `--config.model.num_layers=2`.

    Raises:
      UserError: a missing file, an unknown field (with the nearest name), a value of the wrong type, a broken rule.
    """
    file = Path(path.split(":", 1)[0])
    if not file.is_file():
        raise UserError(f"--config={path}: no such file")
    # A config may build on its neighbours (`from configs import crystal_7b`).
    root = str(file.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    argv = ["crystal-jax", f"--config={path}", *(overrides or [])]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=False)
    try:
        with warnings.catch_warnings():
            # ml_collections 1.1.0 still loads the file by a call that Python 3.12 deprecates.
            warnings.filterwarnings("ignore", r"the load_module\(\) method is deprecated", DeprecationWarning)
            left = values(argv)
    except (KeyError, IndexError) as error:
        raise UserError(f"{_culprit(error, argv)}: {_explain(error)}") from error
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(_last_line(error)) from error
    assert left == argv[:1], "absl takes every --config override"
    if not isinstance(holder.value, Config):
        raise UserError(f"{path}: get_config() returned {type(holder.value).__name__}, not a crystal_jax Config")
    return validate(holder.value)


def _culprit(error: Exception, argv: list[str]) -> str:
    key = str(error.args[0]).split(" ")[1] if "not found on dataclass" in str(error.args[0]) else str(error.args[0])
    named = [arg for arg in argv[2:] if key in arg.split("=")[0]]
    return (named or argv[2:] or argv[1:])[0]


def _explain(error: Exception) -> str:
    message = str(error.args[0])
    if "not found on dataclass" not in message:
        return f"no such entry ({message})"
    field, owner = message.split(" ")[1], message.rsplit(".", 1)[-1].rstrip("'>")
    return f"no field {field}{nearest(field, [known.name for known in dataclasses.fields(getattr(config, owner))])}"


def _last_line(error: Exception) -> str:
    """absl wraps a config file's error in its traceback; its last line is what the user needs."""
    return str(error).strip().splitlines()[-1]
