"""The parity gate: what was written is opened again, run on real tokens and compared with the model in JAX.

One side is the form's own forward pass (forwards.py) over the files, the other the model over the checkpoint, each a
part of a layer at a time, so that neither holds a whole one. The invariant: the two share neither code nor tensors, so
that no mistake of the conversion hides.

Rounding hides one too: a form whose tensors are computed runs a second time, over the values that were rounded into
the files (export.py has compared the files with them bit by bit), and is held to the bar of a form that only moves.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from crystal_jax.kernels import make_seen
from crystal_jax.layers import rotary_tables
from crystal_jax.model import Crystal, map_specs

FILE = "parity.json"
LENGTH = 256
"""Tokens that are compared at most: a multiple of 8."""
QUIET = 8
"""Every so many tokens one enters the layers as small as the norms' eps, since a wrong eps hardly shows in others."""
EXACT = 1e-4
"""Bar of tensors that are only moved, or not yet rounded: sums in another order give 3e-7 in small models, mistakes
1e-3 or more."""
ROUNDED = {"float32": EXACT, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.15}
"""What rounding computed tensors may do, by the coarsest dtype: loose, since mistakes are found before the rounding;
make demo's model has 2e-6, 0.001, 0.011 and 0.025."""
ADDED = {"layers.attn.o_bias", "layers.mlp.down_bias"}
"""What each part of the sum over heads or units would add again."""
TINY = float(np.finfo(np.float32).tiny)
"""What differences are relative to where all is zero."""
BLOCK = 1 << 20
"""Weights of the model that are in memory at a time, if one head of attention has no more: 4 MiB."""

TEXT = '''A crystal grows in layers. Each of them repeats the one below, and a fault that is made early is carried on.
def area(radius: float) -> float:
    """The area of a circle."""
    return 3.14159 * radius ** 2  # naïve, but it will do

for (int i = 0; i < n; ++i) { sum += values[i]; }
The question is not whether it runs, she said: "it always runs". What does it give for 0, for -1, for 10,000?
SELECT name, COUNT(*) FROM stones WHERE hardness > 7 GROUP BY name;
>>> [round(area(radius), 2) for radius in (0.5, 1, 12)]
Salt, quartz and snow have in common that their parts stand in rows; glass, which looks the same, has none.
class Lattice {
    private final double[][] cells = new double[3][3];
    public boolean contains(int row, int column) { return row >= 0 && row < 3 && cells[row][column] != 0.0; }
}
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


@dataclass
class Top:
    """The most probable token of each place, over the rows of the vocabulary so far."""

    logit_T: np.ndarray | float = -math.inf
    token_T: np.ndarray | int = 0

    def add(self, logits_TV: np.ndarray, start: int) -> None:
        """Looks at the logits of some rows, of which the first is row `start`."""
        best_T = logits_TV.argmax(-1)
        found_T = np.take_along_axis(logits_TV, best_T[:, None], 1)[:, 0]
        higher_T = found_T > self.logit_T
        self.logit_T = np.where(higher_T, found_T, self.logit_T)
        self.token_T = np.where(higher_T, best_T + start, self.token_T)


@dataclass
class Run:
    """One forward pass of a form, beside the model's."""

    states: dict[str, float] = field(default_factory=dict)
    """State to its largest difference, relative to the largest value."""
    difference: float = 0.0
    """The largest of two logits."""
    top: Top = field(default_factory=Top)


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
    if (rows := theirs.read(theirs.head).shape[0]) != ours.model.vocab_size:
        raise UserError(f"--to={made.form}: {theirs.head} was written with {rows} rows, not the vocabulary's "
                        f"{ours.model.vocab_size}; the conversion is at fault: report it")
    ids, real = _tokens(weights)
    with np.errstate(over="ignore", invalid="ignore"):  # what isn't finite fails below
        largest, top, (found, *unrounded) = _run(ours, forwards, ids)
    result: dict[str, Any] = {"form": made.form, "tokens": len(ids), "real_tokens": real}
    for run in unrounded:
        result["unrounded"] = {"dtype": made.dtype, "relative_difference": _compare(made, largest, run, EXACT)}
    bar = max(ROUNDED[dtype] for dtype in dtypes) if theirs.rounds else EXACT
    relative = _compare(made, largest, found, bar)
    same = int(np.count_nonzero(found.top.token_T == top.token_T))
    return result | {
        "largest_logit": largest, "largest_difference": found.difference, "relative_difference": relative,
        "bar": bar, "same_top_token": same, "states": found.states}


def _compare(made: Made, largest: float, run: Run, bar: float) -> float:
    """The logits' largest difference, relative to the largest logit; raises UserError if it is above the bar."""
    relative = run.difference / max(largest, TINY)
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
    """The checkpoint in JAX in float32, a part of a layer at a time: some heads of attention, some units of the MLP.

    dtype: what its weights are first rounded to, if any.
    """

    def __init__(self, weights: Weights, dtype: str | None):
        self.model, self.params = weights.model, flatten(weights.params)
        self.axes = {name: spec.axes for name, spec in flatten(Crystal(weights.model).specs()).items()}
        self.dtype = DTYPES[dtype] if dtype else None

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        """The stream [T, D] that enters the first layer."""
        rows, places_T = np.unique(ids_T, return_inverse=True)  # of a large table only what is used
        leaves = {"embed": self._stored("embed", rows)}
        if "positions" in self.params:
            leaves["positions"] = self._stored("positions", slice(0, len(ids_T)))
        return _compute(self.model, "embed", leaves, places_T)

    def layer(self, h_TD: np.ndarray, layer: int) -> np.ndarray:
        for part, pieces in (("attn", self._heads()), ("mlp", self._units())):
            x_TD = self._norm(f"layers.{part}_norm", layer, h_TD)
            for number, (model, cuts) in enumerate(pieces):
                leaves = {name: self._cut(name, layer, cuts) for name in self.params
                          if name.startswith(f"layers.{part}.")}
                if number:  # these are added once
                    leaves |= {name: np.zeros_like(leaves[name]) for name in ADDED & leaves.keys()}
                h_TD = h_TD + _compute(model, part, leaves, x_TD)
        return h_TD

    def final(self, h_TD: np.ndarray) -> np.ndarray:
        """What the head reads of the last layer's stream [T, D]."""
        return self._norm("final_norm", ..., h_TD)

    def logits(self, x_TD: np.ndarray, rows: slice) -> np.ndarray:
        """Those of some rows of the vocabulary."""
        head = "embed" if self.model.choices.tied else "head"
        return _compute(self.model, "logits", {head: self._stored(head, rows)}, x_TD)

    def _heads(self) -> Iterator[tuple[ModelConfig, dict[str, slice]]]:
        """(a model of some heads, axis to their place in the whole model) after the other."""
        model = self.model
        shared = model.num_heads // model.kv_heads  # heads of queries to one of keys and values
        most = max(1, BLOCK // (4 * model.embed_dim * model.head_dim))
        step = most // shared * shared or max(n for n in range(1, most + 1) if shared % n == 0)
        for start in range(0, model.num_heads, step):
            stop = min(start + step, model.num_heads)
            keys = slice(start // shared, (stop - 1) // shared + 1)
            part = replace(model, num_heads=stop - start, num_kv_heads=keys.stop - keys.start,
                           embed_dim=(stop - start) * model.head_dim)
            yield part, {"heads": slice(start, stop), "kv_heads": keys}

    def _units(self) -> Iterator[tuple[ModelConfig, dict[str, slice]]]:
        """(the model, the place of some units of the MLP) after the other."""
        step = max(1, BLOCK // (3 * self.model.embed_dim))
        for start in range(0, self.model.mlp_dim, step):
            yield self.model, {"mlp": slice(start, start + step)}

    def _norm(self, name: str, layer: Any, h_TD: np.ndarray) -> np.ndarray:
        leaves = {f"final_norm.{part}": self._stored(f"{name}.{part}", layer) for part in ("scale", "bias")
                  if f"{name}.{part}" in self.params}
        return _compute(self.model, "norm", leaves, h_TD)

    def _cut(self, name: str, layer: int, cuts: dict[str, slice]) -> np.ndarray:
        return self._stored(name, (layer, *(cuts.get(axis, slice(None)) for axis in self.axes[name][1:])))

    def _stored(self, name: str, part: Any) -> np.ndarray:
        values = np.asarray(self.params[name])[part]
        return values if self.dtype is None else values.astype(self.dtype, copy=False)


def _compute(model: ModelConfig, part: str, leaves: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """A part of the model in float32, from the leaves that it needs, those of a layer without the others'."""
    with jax.default_matmul_precision("highest"):  # accelerators would round the factors to fewer bits
        return np.asarray(_computed(model, part, leaves, x[None]))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _computed(model: ModelConfig, part: str, leaves: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    crystal = Crystal(model)
    nothing = flatten(map_specs(lambda spec: None, crystal.specs()))
    bound = crystal.bind(unflatten(nothing | leaves))
    positions, wide = jnp.arange(x.shape[1])[None, :], jnp.dtype(jnp.float32)
    parts: dict[str, Callable[[], jax.Array]] = {
        "embed": lambda: bound.embedded(x, positions), "norm": lambda: bound.final_norm(x),
        "attn": lambda: bound.layers.attn(x, rotary_tables(model, positions, wide), make_seen("xla", x.shape[1]))[0],
        "mlp": lambda: bound.layers.mlp(x), "logits": lambda: bound.logits(x)}
    return parts[part]()


def _run(ours: Reference, theirs: Sequence[Forward], ids: np.ndarray) -> tuple[float, Top, list[Run]]:
    """(the largest logit, the model's most probable tokens, what each forward pass of the form gave)."""
    runs = [Run() for _ in theirs]

    def note(state: str) -> None:
        for run, b in zip(runs, streams, strict=True):
            run.states[state] = _difference(a, b)

    a, streams = ours.embed(ids), [forward.embed(ids) for forward in theirs]
    note("the embedding")
    loud = np.std(a[QUIET - 1 :: QUIET], axis=1, keepdims=True)
    quiet = np.ones((len(ids), 1), np.float32)
    quiet[QUIET - 1 :: QUIET] = math.sqrt(ours.model.norm_eps) / np.maximum(loud, math.sqrt(ours.model.norm_eps))
    a, streams = a * quiet, [b * quiet for b in streams]
    for layer in range(ours.model.num_layers):
        a, streams = ours.layer(a, layer), [f.layer(b, layer) for f, b in zip(theirs, streams, strict=True)]
        note(f"layer {layer}")
    a, streams = ours.final(a), [f.final(b) for f, b in zip(theirs, streams, strict=True)]
    largest, top, step = 0.0, Top(), max(1, BLOCK // ours.model.embed_dim)
    for start in range(0, ours.model.vocab_size, step):
        rows = slice(start, min(start + step, ours.model.vocab_size))
        expected = ours.logits(a, rows)
        largest = _larger(largest, expected)
        top.add(expected, start)
        for run, forward, b in zip(runs, theirs, streams, strict=True):
            found = forward.logits(b, rows)
            run.difference = _larger(run.difference, found - expected)
            run.top.add(found, start)
    return largest, top, runs


def _larger(largest: float, values: np.ndarray) -> float:
    """The largest so far; NaN if there is one."""
    return float(np.maximum(largest, np.abs(values).max()))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two streams, relative to the largest value.

    A form that widens the stream has further channels after the model's, and streams of mean 0.
    """
    if a.shape != b.shape:
        a, b = a - a.mean(1, keepdims=True), b[:, : a.shape[1]]
    return float(np.abs(a - b).max()) / max(float(np.abs(a).max()), TINY)
