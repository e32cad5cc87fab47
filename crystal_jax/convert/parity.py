"""The parity gate: what was written is opened again, run on real tokens and compared with the model in JAX.

One side is the form's own forward pass (forwards.py) over the files, the other the model over the checkpoint, each a
layer at a time. The invariant: the two share neither code nor tensors, so that no mistake of the conversion hides.

Rounding hides one too: a form whose tensors are computed runs a second time, over the values that were rounded into
the files (export.py has compared the files with them bit by bit), and is held to the bar of a form that only moves.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystal_jax.config import ModelConfig
from crystal_jax.convert.card import ROLES
from crystal_jax.convert.computed import Unrounded
from crystal_jax.convert.folder import open_tensors
from crystal_jax.convert.forms import DTYPES, flatten, unflatten
from crystal_jax.convert.forwards import FORWARDS, Forward, from_gguf, open_gguf
from crystal_jax.convert.made import Made, Weights
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, map_specs

FILE = "parity.json"
LENGTH = 64
"""Tokens that are compared: a multiple of 8."""
QUIET = 8
"""Every so many tokens one enters the layers as small as the norms' eps, since a wrong eps hardly shows in others."""
EXACT = 1e-4
"""Bar of tensors that are only moved, or not yet rounded: sums in another order give 3e-7 in small models, mistakes
1e-3 or more."""
ROUNDED = {"float32": EXACT, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.15}
"""What rounding computed tensors may do, by the coarsest dtype: loose, since mistakes are found before the rounding;
make demo's model has 2e-6, 0.001, 0.011 and 0.025."""
TINY = float(np.finfo(np.float32).tiny)
"""What differences are relative to where all is zero."""
HEAD_ROWS = 8192
"""Of the vocabulary at a time."""

TEXT = '''A crystal grows in layers. Each of them repeats the one below, and a fault that is made early is carried on.
def area(radius: float) -> float:
    """The area of a circle."""
    return 3.14159 * radius ** 2  # naïve, but it will do

for (int i = 0; i < n; ++i) { sum += values[i]; }
The question is not whether it runs, she said: "it always runs". What does it give for 0, for -1, for 10,000?
SELECT name, COUNT(*) FROM stones WHERE hardness > 7 GROUP BY name;
'''
"""Prose and code, for a checkpoint that knows its tokenizer."""

FOUND = """
## Checked

After writing, these files were opened again and run in float32 on {ids}, by a forward
pass written from the form's own definition, and compared with the model in JAX. The logits differ by at most
{difference:.1e} of the largest ({bar:.0e} is allowed); the most probable next token is the same in {same} of {tokens}
places.
"""
UNROUNDED = """
Before its tensors were rounded to {dtype}, the same forward pass differed by at most {difference:.1e} ({bar:.0e} is
allowed).
"""


@dataclass(frozen=True)
class Run:
    """One forward pass of a form, beside the model's."""

    states: dict[str, float]
    """State to its largest difference, relative to the largest value."""
    logits: np.ndarray
    """[T, V]."""


def check(made: Made, folder: Path, weights: Weights) -> dict[str, Any]:
    """What comparing the logits of a written folder with the checkpoint's measured.

    A form whose tensors are moved is compared with the same weights as they are stored; one whose tensors are computed,
    with the checkpoint's, before they were rounded and after.

    Raises:
      UserError: they differ by more than the bar, with the first layer that does; a tensor is missing.
    """
    theirs = _open(made.form, folder)
    dtypes = {str(read().dtype) for read in theirs.tensors.values()}
    forwards = [theirs, _unrounded(made, theirs)] if theirs.rounds else [theirs]
    ours = Reference(weights, None if theirs.rounds else next(iter(dtypes)))
    ids, real = _tokens(weights)
    with np.errstate(over="ignore", invalid="ignore"):  # what isn't finite fails below
        expected, (found, *unrounded) = _run(ours, forwards, ids)
    result: dict[str, Any] = {"form": made.form, "tokens": len(ids), "real_tokens": real}
    for run in unrounded:
        result["unrounded"] = {"dtype": made.dtype, "relative_difference": _compare(made, expected, run, EXACT)}
    bar = max(ROUNDED[dtype] for dtype in dtypes) if theirs.rounds else EXACT
    relative = _compare(made, expected, found, bar)
    same = int(np.count_nonzero(found.logits.argmax(-1) == expected.argmax(-1)))
    return result | {
        "largest_logit": float(np.abs(expected).max()),
        "largest_difference": float(np.abs(found.logits - expected).max()), "relative_difference": relative,
        "bar": bar, "same_top_token": same, "states": found.states}


def _compare(made: Made, expected: np.ndarray, run: Run, bar: float) -> float:
    """The logits' largest difference, relative to the largest; raises UserError if it is above the bar."""
    relative = float(np.abs(run.logits - expected).max()) / max(float(np.abs(expected).max()), TINY)
    if not relative <= bar:  # so that NaN fails
        where = next((name for name, value in run.states.items() if not value <= bar / 10),
                     "the final norm or the head")
        fault = "the conversion or this machine is at fault: try another, and report it"
        if bar > EXACT:  # before the rounding it was right
            fault = f"rounding to {made.dtype} is too coarse for it: use --dtype=float32"
        raise UserError(f"--to={made.form}: what was written isn't the checkpoint's model, so nothing was kept: logits "
                        f"differ by {relative:.1e} of the largest, where {bar:.0e} is allowed; first in {where}; "
                        f"{fault}")
    return relative


def files(result: dict[str, Any], card: bytes) -> dict[str, bytes]:
    """What a result adds to a folder: parity.json, and the model card with its figures."""
    ids = f"{result['tokens']} tokens of mixed prose and code" if result["real_tokens"] else (
        f"{result['tokens']} arbitrary tokens, since no tokenizer is known")
    found = FOUND.format(ids=ids, difference=result["relative_difference"], same=result["same_top_token"],
                         tokens=result["tokens"], bar=result["bar"])
    if "unrounded" in result:
        before = result["unrounded"]
        found += UNROUNDED.format(dtype=before["dtype"], difference=before["relative_difference"], bar=EXACT)
    return {FILE: (json.dumps(result, indent=2) + "\n").encode(), "README.md": card + found.encode()}


def read(folder: Path) -> dict[str, Any]:
    """The result that a folder holds.

    Raises:
      UserError: it holds none.
    """
    try:
        result = json.loads((folder / FILE).read_text())
        files(result, b"")
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / FILE}: missing or not ours, so the folder isn't a finished export; choose another "
                        "--output, or delete the folder") from None
    return result


def _open(form: str, folder: Path) -> Forward:
    if form == "gguf":
        return FORWARDS[form](*open_gguf(next(folder.glob("*.gguf"))))
    return FORWARDS[form](open_tensors(folder), json.loads((folder / "config.json").read_text()))


def _unrounded(made: Made, theirs: Forward) -> Forward:
    """The form with the settings that were written, and the tensors as they were before they were rounded."""
    tensors: dict[str, Callable[[], Any]] = {}
    for name, tensor in made.storage.tensors.items():
        tensors[from_gguf(name) if made.form == "gguf" else name] = partial(Unrounded, tensor)
    return type(theirs)(tensors, theirs.config)


def _tokens(weights: Weights) -> tuple[np.ndarray, bool]:
    """(ids [T] that begin as a document does, whether they are those of TEXT)."""
    length = min(LENGTH, weights.model.max_length)
    if weights.tokenizer is None:
        return np.arange(length) * 7919 % weights.model.vocab_size, False
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights.tokenizer))
    starts = [tokenizer.token_to_id(roles["bos_token"]) for roles in ROLES]
    begin = next(start for start in starts if start is not None)
    ids = [begin, *tokenizer.encode(TEXT, add_special_tokens=False).ids]
    return np.array(ids[:length]), True


class Reference:
    """The checkpoint in JAX in float32, a layer at a time; `dtype` is what its weights are first rounded to, if any."""

    def __init__(self, weights: Weights, dtype: str | None):
        self.model, self.params = weights.model, flatten(weights.params)
        self.dtype = DTYPES[dtype] if dtype else None

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        """The stream [T, D] that enters the first layer."""
        rows, places_T = np.unique(ids_T, return_inverse=True)  # of a large table only what is used
        tables = self._leaves("embed", "positions", part=slice(0, len(ids_T)))
        return self._compute("embed", tables | {"embed": self._stored("embed", rows)}, places_T[None])

    def layer(self, h_TD: np.ndarray, layer: int) -> np.ndarray:
        names = [leaf for leaf in self.params if leaf.startswith("layers.")]
        return self._compute("layer", self._leaves(*names, part=slice(layer, layer + 1)), h_TD[None])

    def logits(self, h_TD: np.ndarray) -> np.ndarray:
        """[T, V]."""
        norm = self._leaves("final_norm.scale", "final_norm.bias")
        h_TD = self._compute("norm", norm, h_TD[None])
        head = "embed" if self.model.choices.tied else "head"
        starts = range(0, self.model.vocab_size, HEAD_ROWS)
        return np.concatenate([self._compute("logits", self._leaves(head, part=slice(start, start + HEAD_ROWS)),
                                             h_TD[None]) for start in starts], axis=1)

    def _leaves(self, *names: str, part: slice = slice(None)) -> dict[str, np.ndarray]:
        return {name: self._stored(name, part) for name in names if name in self.params}

    def _stored(self, name: str, part: slice | np.ndarray) -> np.ndarray:
        values = np.asarray(self.params[name])[part]
        return values if self.dtype is None else values.astype(self.dtype, copy=False)

    def _compute(self, part: str, leaves: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):  # accelerators would round the factors to fewer bits
            return np.asarray(_compute(self.model, part, leaves, x))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _compute(model: ModelConfig, part: str, leaves: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A part of the model in float32, from the leaves that it needs; a layer comes as a stack of one."""
    crystal = Crystal(model)
    nothing = flatten(map_specs(lambda spec: None, crystal.specs()))
    bound = crystal.bind(unflatten(nothing | leaves))
    positions = jnp.arange(x.shape[1])[None, :]
    parts: dict[str, Callable[[], jax.Array]] = {
        "embed": lambda: bound.embedded(x, positions), "layer": lambda: bound.stream(x, positions),
        "norm": lambda: bound.final_norm(x), "logits": lambda: bound.logits(x)}
    return parts[part]()


def _run(ours: Reference, theirs: Sequence[Forward], ids: np.ndarray) -> tuple[np.ndarray, list[Run]]:
    """(the model's logits [T, V], what each forward pass of the form gave)."""
    a, streams = ours.embed(ids), [forward.embed(ids) for forward in theirs]
    states = [{"the embedding": _difference(a, b)} for b in streams]
    loud = np.std(a[QUIET - 1 :: QUIET], axis=1, keepdims=True)
    quiet = np.ones((len(ids), 1), np.float32)
    quiet[QUIET - 1 :: QUIET] = math.sqrt(ours.model.norm_eps) / np.maximum(loud, math.sqrt(ours.model.norm_eps))
    a, streams = a * quiet, [b * quiet for b in streams]
    for layer in range(ours.model.num_layers):
        a, streams = ours.layer(a, layer), [f.layer(b, layer) for f, b in zip(theirs, streams, strict=True)]
        for found, b in zip(states, streams, strict=True):
            found[f"layer {layer}"] = _difference(a, b)
    runs = [Run(found, f.logits(b)) for found, f, b in zip(states, theirs, streams, strict=True)]
    return ours.logits(a), runs


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two streams, relative to the largest value.

    A form that widens the stream has further channels after the model's, and streams of mean 0.
    """
    if a.shape != b.shape:
        a, b = a - a.mean(1, keepdims=True), b[:, : a.shape[1]]
    return float(np.abs(a - b).max()) / max(float(np.abs(a).max()), TINY)
