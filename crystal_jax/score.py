"""Log-probabilities of given tokens under a checkpoint."""

import argparse
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from crystal_jax.checkpoint import Weights, load_weights
from crystal_jax.errors import UserError, reason
from crystal_jax.model import Crystal, Params

BATCH = 8


def score(weights: Weights, tokens_BT: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """Natural-log probability of each next token: int [B, T] to float32 [B, T-1].

    Raises:
      UserError: another shape or type, ids outside the vocabulary, rows longer than the context.
    """
    config = weights.model
    shape = tokens_BT.shape
    if len(shape) != 2 or tokens_BT.dtype.kind not in "iu" or shape[0] < 1 or shape[1] < 2:
        raise UserError(f"--tokens: {tokens_BT.dtype}{list(shape)} must be integers [B, T], B of 1 and T of 2 or more")
    if tokens_BT.shape[1] - 1 > config.max_length:
        raise UserError(f"--tokens: rows of {tokens_BT.shape[1]} tokens; the model's context takes at most "
                        f"{config.max_length + 1}")
    if not (0 <= tokens_BT.min() and tokens_BT.max() < config.vocab_size):
        raise UserError(f"--tokens: ids from {tokens_BT.min()} to {tokens_BT.max()}; the model has 0 to "
                        f"{config.vocab_size - 1}")
    model = Crystal(config, dtype, unroll=config.num_layers)
    params = jax.tree.map(jnp.asarray, weights.params)

    @jax.jit
    def log_probability(params: Params, rows_BT: jax.Array) -> jax.Array:
        ones_BT = jnp.ones((rows_BT.shape[0], rows_BT.shape[1] - 1), jnp.float32)
        return -model.bind(params).loss(rows_BT[:, :-1], rows_BT[:, 1:], ones_BT)[1]

    result = np.empty((tokens_BT.shape[0], tokens_BT.shape[1] - 1), np.float32)
    for first in tqdm(range(0, len(tokens_BT), BATCH), unit_scale=BATCH, unit="row", disable=None):
        rows = tokens_BT[first : first + BATCH].astype(np.int32)
        padded = np.resize(rows, (BATCH, rows.shape[1]))
        result[first : first + BATCH] = np.asarray(log_probability(params, padded))[: len(rows)]
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's folder, or one of its states or exports")
    parser.add_argument("--tokens", required=True, help="a .npy file of integers [B, T]")
    parser.add_argument("--output", required=True, help="the .npy file to write, float32 [B, T-1]")


def read_tokens(path: str) -> np.ndarray:
    """The array of a .npy file.

    Raises:
      UserError: no such file, or another kind.
    """
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokens={path}: {reason(error)}; give a .npy file of integers [B, T]") from error


def check_output(output: Path) -> None:
    """Refuses, before the work, what can't be written after it."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output}: {error.strerror}; name a file in a folder that can be made") from error
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"--output={output}: a folder, or in one that is read-only; name a .npy file to write")


def main(args: argparse.Namespace) -> None:
    tokens, output = read_tokens(args.tokens), Path(args.output)
    weights = load_weights(args.checkpoint)
    check_output(output)
    result = score(weights, tokens)
    temporary = output.with_name(f".{output.name}.tmp.npy")
    np.save(temporary, result)
    os.replace(temporary, output)
    print(f"{output}: float32{list(result.shape)}, mean {result.mean():.4f} nats")
