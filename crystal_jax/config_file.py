"""Reading configs/*.py with overrides from the command line: `--config=FILE[:VARIANT] --config.a.b=VALUE`."""

import contextlib
import dataclasses
import difflib
import json
import re
import sys
import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from crystal_jax.config import Config, nearest
from crystal_jax.errors import UserError
from crystal_jax.rules import validate

RULES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false",
                         list[list[int]]: "a list of pairs, as in [[9,6]]"}


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """The validated Config that `get_config` of the file returns, with overrides such as `--config.model.num_layers=2`.

    Raises:
      UserError: a missing or faulty file, an unknown field (with the nearest name), a value of the wrong type, a
        broken rule.
    """
    config = _from_file(path)
    for override in overrides or []:
        _apply(config, override)
    return validate(config)


def _from_file(path: str) -> Config:
    file = Path(path.split(":", 1)[0])
    if not file.is_file():
        raise UserError(f"--config={path}: no such file{_nearest_file(file)}")
    # A config may build on its neighbours (`from configs import crystal_7b`).
    for root in (str(Path(__file__).parents[1]), str(file.resolve().parent.parent)):
        if root not in sys.path:
            sys.path.insert(0, root)
    argv = ["crystal-jax", f"--config={path}"]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=False)
    try:
        with warnings.catch_warnings():
            # ml_collections 1.1.0 still loads the file by a call that Python 3.12 deprecates.
            warnings.filterwarnings("ignore", r"the load_module\(\) method is deprecated", DeprecationWarning)
            values(argv)
    except UserError as error:  # perhaps of a file that this one builds on, which can't know whose variant it was given
        raise UserError(f"--config={path}: {error}") from error
    except Exception as error:  # a config is a program of the user's: it may raise anything
        # absl wraps the file's error in its traceback, of which the last line says what is wrong.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--config={path}: {type(error).__name__}: {lines[-1]}") from error
    if not isinstance(holder.value, Config):
        raise UserError(f"{path}: get_config() returned {type(holder.value).__name__}, not a crystal_jax Config")
    return holder.value


def _nearest_file(file: Path) -> str:
    """'; did you mean X?' for the config of that folder, or of configs/, whose name is the closest; else nothing."""
    found = {path.stem: path for folder in (Path("configs"), file.parent) for path in folder.glob("[!_]*.py")}
    close = difflib.get_close_matches(file.stem, found, 1, 0.5)
    return f"; did you mean {found[close[0]]}?" if close else ""


def _apply(config: Config, override: str) -> None:
    """Sets one field; `--config.phases[1].mix.code=0.5` also adds an entry to a dict, `=None` unsets an optional."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override}: give a value, as in {override}=VALUE")
    keys = re.findall(r"[^.\[\]]+", name.removeprefix("--config."))
    holder: Any = config
    hint: Any = Config
    for depth, key in enumerate(keys):
        hint, value, key = _member(holder, hint, key, name)
        if depth < len(keys) - 1:
            holder = value
        elif isinstance(holder, dict):
            holder[key] = _parse(hint, text, override)
        else:
            config_path.set_value(str(key), holder, _parse(hint, text, override))


def _member(holder: Any, hint: Any, key: str, name: str) -> tuple[Any, Any, Any]:
    """(type, value or None, key) of an entry of a dataclass, dict or list that is declared as `hint`."""
    if dataclasses.is_dataclass(holder) and not isinstance(holder, type):
        hints = typing.get_type_hints(type(holder))
        if key not in hints:
            elsewhere = [path for path in _fields(Config, "--config") if path.endswith(f".{key}")]
            meant = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else nearest(key, hints)
            raise UserError(f"{name}: no field {key}{meant}")
        return hints[key], getattr(holder, key), key
    if isinstance(holder, list):
        if not key.isdecimal() or int(key) >= len(holder):
            raise UserError(f"{name}: no entry {key}; there are {len(holder)}, from 0 to {len(holder) - 1}")
        return typing.get_args(hint)[0], holder[int(key)], int(key)
    if isinstance(holder, dict):
        # An unknown key is added; `validate` compares it with the names that it must be one of.
        return typing.get_args(hint)[1], holder.get(key), key
    raise UserError(f"{name}: nothing lies below a {type(holder).__name__}")


def _fields(cls: Any, path: str) -> Iterator[str]:
    """The path of every field of a config, as in --config.phases[N].lr.peak and --config.sources.NAME.store."""
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{path}.{name}"
        entry = {list: "[N]", dict: ".NAME"}.get(typing.get_origin(hint), "")
        inner = typing.get_args(hint)[-1] if entry else hint
        if dataclasses.is_dataclass(inner):
            yield from _fields(inner, f"{path}.{name}{entry}")


def _parse(hint: Any, text: str, override: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if text == "None":
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if hint is str:
        return text
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    if hint == list[list[int]]:
        with contextlib.suppress(ValueError):
            return json.loads(text)
    if hint not in RULES:
        raise UserError(f"{override}: a whole {getattr(hint, '__name__', hint)} can't be set here; set its fields one "
                        "by one, or in the config file")
    raise UserError(f"{override}: must be {RULES[hint]}")
