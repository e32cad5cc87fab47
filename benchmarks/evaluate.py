"""Log-likelihood and generation beside transformers on the exported model, in one run; and what sharing contexts saves.

    python -m benchmarks.evaluate [--size=demo|100m] [--documents=12] [--rounds=3]

Both sides get the same token ids in one process: documents of HellaSwag's shape (10-shot contexts, four endings each),
which lm-eval's own backend batches, and prompts that each want the same number of greedy tokens. A rate counts the
tokens of the requests, contexts once per ending, so that work that is shared shows as speed. Rounds take turns; each
figure is the median round's, after one that compiles. Texts and log-probabilities are compared too.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export import draw
from crystal_jax.config import ModelConfig
from crystal_jax.sampling import SLOTS, Request
from crystal_jax.scoring import Query

SIZES = {
    "demo": ModelConfig(vocab_size=4096, embed_dim=128, num_layers=4, num_heads=4, mlp_dim=344, max_length=2048,
                        rotary_dim=8, mup_base_width=64),
    "100m": ModelConfig(vocab_size=32032, embed_dim=640, num_layers=12, num_heads=10, mlp_dim=1712, max_length=2048,
                        rotary_dim=16, mup_base_width=64),
}
CONTEXT_TOKENS, ENDINGS, ENDING_TOKENS = (950, 1450), 4, (12, 36)
"""HellaSwag with ten shots, in tokens of a tokenizer of 32,000."""
PROMPT_TOKENS, NEW_TOKENS = (64, 192), 128


def documents(model: ModelConfig, count: int) -> list[Query]:
    """Each context with its endings, in the order of a file."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        context = tuple(rng.integers(300, model.vocab_size, int(rng.integers(*CONTEXT_TOKENS))).tolist())
        for _ in range(ENDINGS):
            size = int(rng.integers(*ENDING_TOKENS))
            found.append(Query(context, tuple(rng.integers(300, model.vocab_size, size).tolist())))
    return found


def prompts(model: ModelConfig) -> list[Request]:
    """Two for each slot, of different lengths; none ends early, since no </s> is ever the most probable."""
    rng = np.random.default_rng(1)
    return [Request(tuple(rng.integers(300, model.vocab_size, length).tolist()), NEW_TOKENS)
            for length in rng.integers(*PROMPT_TOKENS, 2 * SLOTS)]


def build(folder: Path, model: ModelConfig) -> tuple[Path, Path]:
    """A checkpoint of drawn weights, and its export."""
    from crystal_jax.checkpoint import save_weights
    from crystal_jax.convert.calendar import export_checkpoint
    from crystal_jax.convert.forms import leaf_shape, leaves, unflatten
    from crystal_jax.convert.made import Options

    params: Any = unflatten({leaf: draw(leaf, leaf_shape(leaf, model)) for leaf in leaves(model)})
    params["embed"][2] = 0  # </s>
    save_weights(folder / "checkpoint", params, model, None, {"name": "benchmark"})
    export_checkpoint(str(folder / "checkpoint"), "crystal", folder / "exported", Options())
    return folder / "checkpoint", folder / "exported"


def torch_ways(exported: Path, batch: int = 8) -> tuple[Callable[[list[Query]], list[float]],
                                                        Callable[[list[Request]], list[list[int]]]]:
    """(log-probabilities, greedy texts) by transformers: rows side by side, filled up to the longest."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.float32).eval()
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>", pad_token="</s>")
    backend = HFLM(pretrained=model, tokenizer=plain, batch_size=batch, max_length=model.config.max_position_embeddings)

    def score(queries: list[Query]) -> list[float]:
        found = backend._loglikelihood_tokens([((str(n), ""), list(context), list(ids))
                                               for n, (context, ids) in enumerate(queries)], disable_tqdm=True)
        return [logprob for logprob, _ in found]

    def generate(requests: list[Request]) -> list[list[int]]:
        texts = []
        for first in range(0, len(requests), batch):
            rows = [request.prompt for request in requests[first : first + batch]]
            width, new = max(map(len, rows)), requests[first].max_tokens
            ids = torch.tensor([[2] * (width - len(row)) + list(row) for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            with torch.no_grad():
                made = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=2)
            texts += made[:, width:].tolist()
        return texts

    return score, generate


def timed(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """(seconds of the median round, what came out) of each, in turns, after one round that isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {name: way() for name, way in ways.items()}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="demo", choices=SIZES)
    parser.add_argument("--documents", type=int, default=12, help="of four endings each")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import jax
    import jax.numpy as jnp

    from crystal_jax.checkpoint import load_weights
    from crystal_jax.model import Crystal
    from crystal_jax.sampling import Sampler
    from crystal_jax.scoring import Scorer

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    config = SIZES[args.size]
    asked, requests = documents(config, args.documents), prompts(config)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, exported = build(Path(folder), config)
        theirs_score, theirs_generate = torch_ways(exported)
        model = Crystal(config, "float32", unroll=config.num_layers)
        params = jax.tree.map(jnp.asarray, load_weights(checkpoint).params)
    scorer, sampler = Scorer(model, params), Sampler(model, params, eos_id=2)
    scores, found = timed({"ours": lambda: [score.logprob for score in scorer(asked)],
                           "transformers": lambda: theirs_score(asked)}, args.rounds)
    naive = sum(len(context) + len(ids) - 1 for context, ids in asked)
    computed = scorer.computed / (args.rounds + 1)
    worst = max(abs(a - b) for a, b in zip(found["ours"], found["transformers"], strict=True))
    texts, made = timed({"ours": lambda: [ids for _, ids in sorted(sampler(requests))],
                         "transformers": lambda: theirs_generate(requests)}, args.rounds)
    same = sum(a == b for a, b in zip(made["ours"], made["transformers"], strict=True))
    new = sum(request.max_tokens for request in requests)
    print("| of " + args.size + " | ours, tokens/s | transformers, tokens/s | ratio |\n|---|---|---|---|")
    for name, seconds, tokens in (("log-likelihood", scores, naive), ("generation", texts, new)):
        ours, theirs = tokens / seconds["ours"], tokens / seconds["transformers"]
        print(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |")
    print(f"tokens computed with shared contexts against naive: {computed:,.0f} of {naive:,} = {computed / naive:.2f}")
    print(f"largest difference of a log-probability: {worst:.1e}; equal texts: {same} of {len(requests)}")


if __name__ == "__main__":
    main()
