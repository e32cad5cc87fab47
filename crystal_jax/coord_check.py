"""`coord_check`: do activations keep their size when the model gets wider? Then is a learning rate that suits a narrow
model the wide one's too.

Invariant: what is measured is the model that trains, with its own initial values, losses and updates; only its sizes
are smaller, and its tokens drawn at random.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystal_jax import files, sharding
from crystal_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from crystal_jax.errors import UserError
from crystal_jax.kernels import make_seen
from crystal_jax.layers import project, rotary_matrix, rotary_tables, rotate
from crystal_jax.model import Block, Crystal, init_params
from crystal_jax.mup import at_widths, standard
from crystal_jax.optimizer import make_optimizer
from crystal_jax.train import use_compilation_cache
from crystal_jax.update import TrainState, make_train_step

LAYERS, VOCAB, LENGTH, BATCH = 4, 512, 64, 4
"""At most: what the sizes of activations don't depend on is kept small."""
PEAK_SHARE = 0.125
"""Of the recipe's peak learning rate: its first updates warm up and never see the peak itself."""
BAR = 0.2
"""How far from what muP has a slope of log2(size) over log2(width) may be: 1.15 times the size at twice the width."""
PLACES = {"embedding": 0.0, "scores": -0.5, "attention": 0.0, "mlp": 0.0, "stream": 0.0, "logits": -0.5}
"""Place to the slope that its initial values have. Queries and keys, stream and output matrix begin independent of each
other: their products fade as 1 / sqrt(width) until they are learned, and are then as large at any width."""


@dataclass(frozen=True)
class Result:
    """What a check found, in plain data; the first column of `sizes` is before any update."""

    parametrisation: str
    """muP or standard."""
    lr: float
    seeds: int
    widths: list[int]
    sizes: dict[str, list[list[float]]]
    """Place to mean |x| per width and updates done, over tokens, dims, layers and seeds."""
    changes: dict[str, list[list[float]]]
    """The same of the difference to what it was before the first update, from the first update on."""

    def slopes(self, place: str) -> tuple[list[float], list[float]]:
        """Of log2 over log2(width), fitted: of the sizes and of the changes, per updates done."""
        x = np.log2(self.widths) - np.log2(self.widths).mean()
        with np.errstate(divide="ignore", invalid="ignore"):  # of what has no size, `problem` tells
            sizes, changes = (((x @ np.log2(found[place])) / (x @ x)).tolist() for found in (self.sizes, self.changes))
        return sizes, changes

    def problem(self, place: str) -> tuple[str, float]:
        """(how a place depends on the width, by which power), or ("", 0): slopes lie between the initial one and 0."""
        slopes = np.concatenate(self.slopes(place))
        if not np.isfinite(slopes).all():
            return "is zero or not finite", float("nan")
        if slopes.max() > BAR:
            return "grows", float(slopes.max())
        return ("fades", float(slopes.min())) if slopes.min() < PLACES[place] - BAR else ("", 0.0)

    @property
    def problems(self) -> dict[str, tuple[str, float]]:
        """Of the places that have one."""
        return {place: found for place in PLACES if (found := self.problem(place))[0]}


def coord_check(model: ModelConfig, optimizer: OptimizerConfig, lr: float, widths: Sequence[int],
                use_standard: bool = False, steps: int = 4, seeds: int = 3,
                progress: Callable[[str], Any] = lambda line: None) -> Result:
    """Trains the model at each width for a few updates and measures its activations after each.

    `progress` is given a line before each width.

    Raises:
      UserError: widths that don't fit the model.
    """
    small = replace(model, num_layers=min(model.num_layers, LAYERS), vocab_size=min(model.vocab_size, VOCAB),
                    max_length=min(model.max_length, LENGTH))
    found = []
    for width, sized in at_widths(small, widths).items():
        progress(f"width {width}: {seeds} seeds of {steps} updates")
        found.append((width, _at_one(standard(sized) if use_standard else sized, optimizer, lr, steps, seeds)))

    def table(which: int) -> dict[str, list[list[float]]]:
        return {place: [measured[place][which].tolist() for _, measured in found] for place in PLACES}

    return Result("standard" if use_standard else "muP", lr, seeds, [width for width, _ in found], table(0), table(1))


def _at_one(config: ModelConfig, optimizer_config: OptimizerConfig, lr: float, steps: int,
            seeds: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Place to (sizes [steps + 1], changes [steps]) at one width."""
    model = Crystal(config)
    optimizer = make_optimizer(optimizer_config, config, model.specs())
    train_step, init = make_train_step(model, optimizer, 1), jax.jit(optimizer.init)
    look = jax.jit(lambda params, ids: activations(model.bind(params), ids))
    device = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    runs = []
    for seed in range(1, seeds + 1):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), init_params(model.specs(), seed, device))
        state, batch = TrainState(params, init(params)), _batch(config, seed)
        before = look(state.params, batch["inputs"])
        run = [_mean_sizes(before, before)]
        for _ in range(steps):
            state, _ = train_step(state, batch, jnp.float32(lr))
            run.append(_mean_sizes(look(state.params, batch["inputs"]), before))
        runs.append(run)
    means = {place: np.mean([[found[place] for found in run] for run in runs], axis=0) for place in PLACES}
    return {place: (values[:, 0], values[1:, 1]) for place, values in means.items()}


@jax.jit
def _mean_sizes(now: dict[str, jax.Array], before: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Place to (mean |x|, mean |change|)."""
    return {place: (jnp.abs(x).mean(), jnp.abs(x - before[place]).mean()) for place, x in now.items()}


def _batch(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Tokens as frequent as words are (Zipf's law): the k-th has a share of 1 / k."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, config.vocab_size + 1)
    ids = rng.choice(config.vocab_size, (BATCH, config.max_length + 1), p=share / share.sum()).astype(np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "mask": np.ones((BATCH, config.max_length), np.float32),
            "source": np.zeros(BATCH, np.int32)}


def activations(model: Crystal, ids_BT: jax.Array) -> dict[str, jax.Array]:
    """Place to its values for tokens [B, T], by a model with parameters; layers, where there are several, lead.

    scores [L, B, N, T, S] are those of attention before its mask; attention and mlp what each adds to the stream.
    """
    config, positions_BT = model.config, jnp.arange(ids_BT.shape[1])[None, :]
    rotary, seen = rotary_tables(config, positions_BT, jnp.dtype(model.dtype)), make_seen("xla", ids_BT.shape[1])

    def layer(h_BTD: jax.Array, block: Block) -> tuple[jax.Array, dict[str, jax.Array]]:
        x_BTD = block.attn_norm(h_BTD)
        mixed_BTD, (k_BKSH, _) = block.attn(x_BTD, rotary, seen)
        added_BTD = block.mlp(block.mlp_norm(h_BTD + mixed_BTD))
        places = {"scores": _scores(config, block, x_BTD, k_BKSH, rotary), "attention": mixed_BTD, "mlp": added_BTD}
        return h_BTD + mixed_BTD + added_BTD, places

    embedded_BTD = model.embedded(ids_BT, positions_BT)
    last_BTD, places = jax.lax.scan(layer, embedded_BTD, model.layers)
    return {"embedding": embedded_BTD, **places, "stream": last_BTD, "logits": model.logits(model.final_norm(last_BTD))}


def _scores(config: ModelConfig, block: Block, x_BTD: jax.Array, k_BKSH: jax.Array,
            rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """q k^T / H^power [B, N, T, S] of a layer, for its normalised stream and its keys."""
    q_BNTH, = project("btd,dnh->bnth", x_BTD, block.attn, ("q",), ("batch", "heads", "length", None))
    if config.rotary_dim:
        q_BNTH = rotate(q_BNTH, *rotary, rotary_matrix(config))
    k_BNSH = jnp.repeat(k_BKSH, config.num_heads // config.kv_heads, axis=1)
    return jnp.einsum("bnth,bnsh->bnts", q_BNTH, k_BNSH) * config.head_dim**-config.choices.attention_power


def render(result: Result) -> str:
    """The table and a line with the verdict."""
    rows = [("place", *map(str, result.widths), "slope of sizes", "of changes", "")]
    for place in PLACES:
        sizes, changes = result.slopes(place)
        rows.append((place, *(f"{size[-1]:.3g}" for size in result.sizes[place]),
                     *(f"{min(slopes):+.2f} to {max(slopes):+.2f}" for slopes in (sizes, changes)),
                     result.problem(place)[0] or "ok"))
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(columns[0]) if i == 0 else cell.rjust(columns[i]) for i, cell in enumerate(row))
             for row in rows]
    steps = len(result.changes["stream"][0])
    head = (f"{result.parametrisation}: mean |x| by width after {steps} updates at a learning rate of {result.lr:.3g}, "
            f"{result.seeds} seeds; slopes of log2 over log2(width) after 0 to {steps} updates")
    return "\n".join([head, "", *(line.rstrip() for line in lines), "", verdict(result)])


def verdict(result: Result) -> str:
    """One line."""
    across = f"widths {result.widths[0]} to {result.widths[-1]}"
    if not result.problems:
        return f"flat over {across}: every slope is within {BAR} of those that muP has"
    told = ", ".join(f"{place} {how} (slope {slope:+.2f})" for place, (how, slope) in result.problems.items())
    return f"not flat over {across}: {told}"


def _list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--widths={text}: must be whole numbers with commas, such as 64,128,256") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="configs/X.py[:VARIANT]; --config.a.b=VALUE overrides a field")
    parser.add_argument("--widths", type=_list, default=[64, 128, 256, 512], help="with commas: 64,128,256,512")
    parser.add_argument("--steps", type=int, default=4, help="updates (4)")
    parser.add_argument("--seeds", type=int, default=3, help="models at each width (3)")
    parser.add_argument("--lr", type=float, help="learning rate of all updates; an eighth of phase 1's peak by default")
    parser.add_argument("--standard", action="store_true", help="leave out what muP adds: how it fails without")
    parser.add_argument("--output", help="folder for coord_check.png and coord_check.json")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def main(args: argparse.Namespace) -> int:
    """Exit code 0 for flat activations, 1 for others."""
    config: Config = args.config
    for name in ("steps", "seeds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: must be 1 or more")
    lr = config.phases[0].lr.peak * PEAK_SHARE if args.lr is None else args.lr
    if not 0 < lr < float("inf"):
        raise UserError(f"--lr={lr:g}: must be above 0, such as {config.phases[0].lr.peak * PEAK_SHARE:g}")
    use_compilation_cache()
    result = coord_check(config.model, config.optimizer, lr, args.widths, args.standard, args.steps, args.seeds,
                         lambda line: print(line, file=sys.stderr, flush=True))
    found = {**asdict(result), "slopes": {place: dict(zip(("sizes", "changes"), result.slopes(place), strict=True))
                                          for place in PLACES}, "flat": not result.problems, "verdict": verdict(result)}
    if args.output:
        from crystal_jax.plots_mup import draw_coord_check

        folder = files.as_path(args.output)
        files.write_bytes(folder / "coord_check.png", draw_coord_check(result))
        files.write_bytes(folder / "coord_check.json", (json.dumps(found, indent=2) + "\n").encode())
    print(json.dumps(found, indent=2) if args.json else render(result))
    return 1 if result.problems else 0
