"""Fill-in-the-middle on held-out code of the run: single lines, several lines and random spans.

Invariant: which spans are taken depends on the stores and the seed only, so that every checkpoint is asked the same.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from crystal_jax.config import Config
from crystal_jax.data.documents import read_documents
from crystal_jax.data.fim import fim_prompt
from crystal_jax.data.pipeline import Stores
from crystal_jax.data.store import TokenStore
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError
from crystal_jax.evaluation.subject import Subject
from crystal_jax.evaluation.walk import Task
from crystal_jax.sampling import Request, key_of
from crystal_jax.scoring import Query

KINDS = ("single_line", "multi_line", "random_span")
LINES = (2, 6)
"""Of a multi-line gap."""
SPAN_CHARACTERS = (10, 120)
AROUND_CHARACTERS = 2000
"""Before a gap and behind it, at most; less where the model's context is shorter."""
LARGEST_SHARE = 4
"""A gap has at most this part of the model's context, so that there is something around it."""
SEED = 1


@dataclass(frozen=True)
class Gap:
    prefix: str
    middle: str
    suffix: str


def infilling_task(config: Config, gaps: int = 100) -> Task:
    """`gaps` of each kind.

    Raises:
      UserError: the stores aren't there, or have no held-out code.
    """
    stores = Stores(config)
    code = {store.path: store for name, store in sorted(stores.by_source.items())
            if config.sources[name].domain == "code"}
    texts = [text for _, store in sorted(code.items()) for text in _texts(store, stores.tokenizer)]
    if not texts:
        raise UserError("--tasks=infilling: the run's stores have no held-out code; prepare them with --heldout")
    room = config.model.max_length // LARGEST_SHARE
    asked = {kind: list(_gaps(texts, kind, gaps, lambda gap: len(stores.tokenizer.encode_fragment(gap.middle)) <= room))
             for kind in KINDS}
    for kind, found in asked.items():
        if not found:
            raise UserError(f"--tasks=infilling: the held-out code has no gap of the kind {kind} with at most {room} "
                            f"tokens, a quarter of the model's context")

    def run(subject: Subject) -> dict[str, float]:
        return {f"{kind}.{name}": value for kind in KINDS for name, value in measure(subject, asked[kind]).items()}

    return Task("infilling", run, {"task": "infilling", "fingerprints": stores.fingerprints(), "gaps": gaps})


def _texts(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """Held-out documents without what control tokens say of them."""
    if not store.splits["heldout"]["tokens"]:
        return
    view = store.view("heldout")
    for span in view.shards:
        for document in read_documents(store, view, "heldout", span):
            yield tokenizer.decode(document.ids.tolist(), skip_special=True)


def _gaps(texts: list[str], kind: str, count: int, fits: Callable[[Gap], bool]) -> Iterator[Gap]:
    """Up to `count`, each of another document where there are so many."""
    rng = np.random.Generator(np.random.Philox(key_of("infilling", kind, SEED)))
    made = 0
    for number in range(20 * count):
        if number % len(texts) == 0:
            order = rng.permutation(len(texts))
        gap = cut(texts[order[number % len(texts)]], kind, rng)
        if gap is not None and fits(gap):
            made += 1
            yield gap
        if made == count:
            return


def cut(text: str, kind: str, rng: np.random.Generator) -> Gap | None:
    """A gap of a kind in a text, with something but space in it, or None where the text has no place for it."""
    if kind == "random_span":
        length = int(rng.integers(*SPAN_CHARACTERS))
        if len(text) < 3 * length:
            return None
        start = int(rng.integers(1, len(text) - length))
        end = start + length
    else:
        starts = [0, *(match.end() for match in re.finditer("\n", text))]
        lines = 1 if kind == "single_line" else int(rng.integers(LINES[0], LINES[1] + 1))
        if len(starts) < lines + 3:
            return None
        first = int(rng.integers(1, len(starts) - lines - 1))
        start, end = starts[first], starts[first + lines] - 1
    if not text[start:end].strip():
        return None
    return Gap(text[max(start - AROUND_CHARACTERS, 0) : start], text[start:end], text[end : end + AROUND_CHARACTERS])


def measure(subject: Subject, gaps: list[Gap]) -> dict[str, float]:
    """Share of gaps that greedy decoding fills exactly but for space at the ends, and the middles' bits per byte."""
    prompts, middles = [], []
    for gap in gaps:
        middle = subject.tokenizer.encode_fragment(gap.middle)
        prompts.append(_prompt(subject, gap, len(middle)))
        middles.append(middle)
    room = [min(2 * len(middle) + 8, subject.model.config.max_length - len(prompt))
            for prompt, middle in zip(prompts, middles, strict=True)]
    asked = [Request(tuple(prompt), tokens) for prompt, tokens in zip(prompts, room, strict=True)]
    found = dict(subject.sampler(asked))
    exact = sum(subject.tokenizer.decode_fragment(found[i]).strip() == gap.middle.strip() for i, gap in enumerate(gaps))
    scores = subject.scorer([Query(tuple(prompt), tuple(middle))
                             for prompt, middle in zip(prompts, middles, strict=True)])
    nats = -math.fsum(score.logprob for score in scores)
    size = sum(len(gap.middle.encode()) for gap in gaps)
    return {"exact_match": exact / len(gaps), "bits_per_byte": nats / math.log(2) / size, "gaps": float(len(gaps))}


def _prompt(subject: Subject, gap: Gap, middle: int) -> list[int]:
    """The layout of training, with as much around the gap as leaves room for twice the middle."""
    room = subject.model.config.max_length - 2 * middle - 8
    around = AROUND_CHARACTERS
    while True:
        prompt = fim_prompt(subject.tokenizer, gap.prefix[-around:] if around else "", gap.suffix[:around])
        if len(prompt) <= room or not around:
            return prompt
        around //= 2
