"""Documents to the ids that a store holds: <s>, the text, control ids in the place of tags, </s>.

This file owns where control ids come from: from the tags that a reader found, or from data that were tokenised before;
never from text that looks like one. Its invariant: the text between two tags has the ids that it has inside a document.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crystal_jax.data.fast_tokenizer import make_encoder
from crystal_jax.data.readers import Document, Tokens
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError

PROVED = 8
"""Documents that `prove` tokenises twice."""
LEAD = "\n"
"""Stands before text that goes on inside a document, in the engine's place for a document's beginning: no piece holds a
line end and anything else, so that the ids after it are those of the text."""


class Text(NamedTuple):
    """What the engine encodes as a document of its own."""

    text: str
    skip: int
    """Ids at its head that aren't written."""


class DocumentEncoder:
    """Encodes batches of documents with one tokenizer and one engine (auto, reference or fast).

    Raises:
      UserError: an engine that isn't there.
    """

    def __init__(self, tokenizer: Tokenizer, engine: str) -> None:
        self.tokenizer = tokenizer
        self._engine = make_encoder(tokenizer, engine)
        self._special = np.array(tokenizer.special_ids, np.int32)
        self._token_of = {tokenizer.decode([token]): token for token in tokenizer.special_ids}
        self._lead = len(tokenizer.encode_document(LEAD))

    @property
    def engine(self) -> str:
        """What tokenises, with its version."""
        return self._engine.package

    def prove(self, batch: Sequence[Document | Tokens]) -> None:
        """Compares the engine with the reference on the first documents of a batch."""
        self._engine.prove([document.text for document in batch[:PROVED] if isinstance(document, Document)])

    def encode(self, batch: Sequence[Document | Tokens]) -> list[np.ndarray]:
        """int32 ids of each document, complete.

        Raises:
          UserError: a tag that the tokenizer has no token for, an id that it doesn't have.
        """
        cut = [self._pieces(document) for document in batch]
        texts = [piece for pieces in cut for piece in pieces if isinstance(piece, Text)]
        encoded = self._engine.encode_documents([piece.text for piece in texts])
        written = iter([ids[piece.skip :] for ids, piece in zip(encoded, texts, strict=True)])
        return [
            np.concatenate([next(written) if isinstance(piece, Text) else piece for piece in pieces]) for pieces in cut
        ]

    def controls(self, document: Document | Tokens) -> Counter[int]:
        """How often each control id is written inside a document, 0 times for those that merely may be."""
        if isinstance(document, Document):
            return Counter(self._control(document, name) for _, _, name in document.tags)
        # <s> and </s> too, met or not: nothing says that such a document begins and ends with them.
        found = Counter({self.tokenizer.bos_id: 0, self.tokenizer.eos_id: 0})
        found.update(document.ids[np.isin(document.ids, self._special)].tolist())
        return found

    def _pieces(self, document: Document | Tokens) -> list[Text | np.ndarray]:
        if isinstance(document, Tokens):
            return [self._checked(document)]
        pieces: list[Text | np.ndarray] = [_one(self.tokenizer.bos_id)]
        done = 0
        for start, end, name in document.tags:
            pieces += self._between(document.text[done:start], inside=done > 0)
            pieces.append(_one(self._control(document, name)))
            done = end
        return [*pieces, *self._between(document.text[done:], inside=done > 0), _one(self.tokenizer.eos_id)]

    def _between(self, text: str, inside: bool) -> list[Text | np.ndarray]:
        if not text:
            return []
        if not inside:
            return [Text(text, 0)]
        if self.tokenizer.cuts_safely:
            return [Text(LEAD + text, self._lead)]
        return [np.asarray(self.tokenizer.encode_fragment(text), np.int32)]

    def _control(self, document: Document, name: str) -> int:
        content = f"<|{name}|>"
        if content not in self._token_of:
            raise UserError(f"{self.tokenizer.path}: has no {content}, which {document.source} needs; give a tokenizer "
                            "with Crystal's control tokens (`tokenizer train` makes one)")
        return self._token_of[content]

    def _checked(self, document: Tokens) -> np.ndarray:
        ids = document.ids
        if len(ids) and not (0 <= ids.min() and ids.max() < self.tokenizer.vocab_size):
            worst = int(ids.max() if ids.max() >= self.tokenizer.vocab_size else ids.min())
            raise UserError(f"{document.source}: {document.id} holds id {worst}, but {self.tokenizer.path} has 0 to "
                            f"{self.tokenizer.vocab_size - 1}; give the tokenizer that the data were made with")
        return ids.astype(np.int32, copy=False)


def _one(token: int) -> np.ndarray:
    return np.array([token], np.int32)
