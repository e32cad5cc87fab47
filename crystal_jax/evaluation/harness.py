"""A checkpoint as a model of lm-evaluation-harness: the three kinds of requests, computed by our own model.

The one file that imports lm_eval, for 1.5 s and without torch: import it where it is used. Invariant: what a request
gives depends on its own text and settings only; a sample's key is made of its task, document and number.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError
from crystal_jax.sampling import Request, Sampler, key_of, sample_texts
from crystal_jax.scoring import Query, Scorer

MAX_NEW_TOKENS = 256
"""Where a task states none, as in lm-eval's own backends."""


class CrystalLM(TemplateLM):
    """lm-eval's view of a model.

    As the published results were made, no <s> precedes a text but an empty one; `add_bos` puts it there.
    """

    def __init__(self, scorer: Scorer, sampler: Sampler, tokenizer: Tokenizer, add_bos: bool = False,
                 progress: bool = False):
        super().__init__()
        self.scorer, self.sampler, self._tokenizer = scorer, sampler, tokenizer
        self.max_length = scorer.model.config.max_length
        self.add_bos, self.progress = add_bos, progress
        self.cut = 0
        """Requests so far whose context was too long for the model, so that only its end was asked."""

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; "<s>" and the like in it stay text."""
        start = [self._tokenizer.bos_id] if self.add_bos and add_special_tokens is not False else []
        return start + self._tokenizer.encode_document(string)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[
            tuple[float, bool]]:
        before = self.scorer.cut
        found = self.scorer([Query(tuple(context), tuple(ids)) for _, context, ids in requests], self.progress)
        self.cut += self.scorer.cut - before
        return [(score.logprob, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the model's context that don't overlap."""
        owners, queries = [], []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                    self.max_length, 1):
                context, ids = make_disjoint_window(window)
                owners.append(index)
                queries.append(Query(tuple(context), tuple(ids)))
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.scorer(queries, self.progress), strict=True):
            totals[owner] += score.logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to its first stop string, </s> or the number of tokens that its task allows."""
        asked = list(self._requests(requests))
        stops = [_stops(request.args[1]) for request in requests]
        return sample_texts(self.sampler, asked, stops, self._tokenizer.decode_fragment, self._text, self.progress)

    def _requests(self, requests: list[Instance]) -> Iterator[Request]:
        seen: Counter[tuple[str | None, int | None]] = Counter()
        for request in requests:
            text, settings = request.args
            tokens = int(settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_NEW_TOKENS)))
            if not 0 < tokens < self.max_length:
                raise UserError(f"task {request.task_name}: max_gen_toks {tokens} must be from 1 to "
                                f"{self.max_length - 1}, so that the model's context has room for a prompt")
            sampled = settings.get("do_sample", settings.get("temperature", 0.0) > 0)
            document = (request.task_name, request.doc_id)
            prompt, room = self.tok_encode(text) or [self.prefix_token_id], self.max_length - tokens
            self.cut += len(prompt) > room
            yield Request(tuple(prompt[-room:]), tokens, float(settings.get("temperature", 1.0)) if sampled else 0.0,
                          float(settings.get("top_p", 1.0)), key_of(*document), seen[document])
            seen[document] += 1

    def _text(self, ids: list[int]) -> str:
        special = set(self._tokenizer.special_ids)
        return self._tokenizer.decode_fragment(token for token in ids if token not in special)


def _stops(settings: dict[str, Any]) -> list[str]:
    found = settings.get("until") or []
    return [found] if isinstance(found, str) else [stop for stop in found if stop]
