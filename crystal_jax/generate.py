"""Text from a checkpoint: completion and filling in the middle, one prompt at a time.

A sample's text depends on its prompt, the seed and its number only, never on what is sampled beside it.
"""

import argparse
import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from crystal_jax.checkpoint import Weights, load_weights
from crystal_jax.data.fim import fim_prompt
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal
from crystal_jax.sampling import Request, Sampler


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = 64
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set with at least this probability."""
    seed: int = 0
    num_samples: int = 1

    def check(self) -> None:
        for name, rule, holds in (("max_tokens", "above 0", self.max_tokens > 0),
                                  ("temperature", "0 or more", self.temperature >= 0),
                                  ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
                                  ("seed", "from 0 to 2147483647", 0 <= self.seed < 2**31),
                                  ("num_samples", "above 0", self.num_samples > 0)):
            if not holds:
                raise UserError(f"--{name}: {getattr(self, name)} must be {rule}")


class Generator:
    """A loaded checkpoint that completes prompts.

    Raises:
      UserError: a path that is no checkpoint, or one without a tokenizer.
    """

    def __init__(self, weights: Weights, dtype: str = "float32"):
        if weights.tokenizer is None:
            raise UserError("--checkpoint: it has no tokenizer.json beside it, so text can't be generated; put the "
                            "tokenizer it was trained with there")
        self.tokenizer = Tokenizer.load(weights.tokenizer)
        self.config = weights.model
        self.model = Crystal(weights.model, dtype, unroll=weights.model.num_layers)
        self.params = jax.tree.map(jnp.asarray, weights.params)

    def complete(self, prompt: str, sampling: Sampling) -> list[str]:
        """What follows `prompt`, once per sample. Special tokens in the prompt are recognised; <s> goes before it."""
        return self._texts([self.tokenizer.bos_id, *self.tokenizer.encode_prompt(prompt)], sampling)

    def infill(self, prefix: str, suffix: str, sampling: Sampling) -> list[str]:
        """What stands between `prefix` and `suffix`, once per sample."""
        return self._texts(fim_prompt(self.tokenizer, prefix, suffix), sampling)

    def _texts(self, prompt: list[int], sampling: Sampling) -> list[str]:
        return [self.tokenizer.decode_fragment(ids) for ids in self.tokens(prompt, sampling)]

    def tokens(self, prompt: list[int], sampling: Sampling) -> list[list[int]]:
        """Ids that follow the ids of a prompt, without the </s> that ends them.

        Raises:
          UserError: prompt and max_tokens together are longer than the model's context.
        """
        sampling.check()
        room = self.config.max_length - len(prompt)
        if sampling.max_tokens > room:
            raise UserError(f"--max_tokens: {sampling.max_tokens} after a prompt of {len(prompt)} tokens is more than "
                            f"the model's context of {self.config.max_length}; at most {max(room, 0)} fit")
        requests = [Request(tuple(prompt), sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed, n)
                    for n in range(sampling.num_samples)]
        found = dict(Sampler(self.model, self.params, self.tokenizer.eos_id)(requests))
        return [found[n] for n in range(sampling.num_samples)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's folder, or one of its states or exports")
    parser.add_argument("--prompt", help="text to complete")
    parser.add_argument("--prefix", help="with --suffix: text before the gap to fill")
    parser.add_argument("--suffix", help="text after the gap")
    default = Sampling()
    for name in ("max_tokens", "temperature", "top_p", "seed", "num_samples"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--json", action="store_true", help="one JSON object per sample")


def main(args: argparse.Namespace) -> None:
    infilling = args.prefix is not None or args.suffix is not None
    if infilling == (args.prompt is not None):
        raise UserError("--prompt: give either --prompt=TEXT or --prefix=TEXT --suffix=TEXT")
    sampling = Sampling(args.max_tokens, args.temperature, args.top_p, args.seed, args.num_samples)
    sampling.check()
    generator = Generator(load_weights(args.checkpoint))
    prefix, suffix = (args.prefix or "", args.suffix or "") if infilling else (args.prompt, "")
    texts = generator.infill(prefix, suffix, sampling) if infilling else generator.complete(prefix, sampling)
    for number, text in enumerate(texts):
        if args.json:
            print(json.dumps({"sample": number, "prefix": prefix, "text": text, "suffix": suffix}))
        else:
            header = f"--- {number + 1} of {len(texts)}\n" if len(texts) > 1 else ""
            print(f"{header}{prefix}{text}{suffix}")
