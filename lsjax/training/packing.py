"""Documents -> rows of tokens, one behind the other, from any place in the corpus on.

A row is full: what is left of a document when a row ends goes on in the next row as a piece of its
own, which does not see the piece before; only the last target of a piece is the next one's first
token. So every token is read once an epoch, and every one but a document's first is foreseen once.
"""

import dataclasses
import functools

import numpy as np

from lsjax.errors import UserError
from lsjax.training.batch import Batch
from lsjax.training.documents import Corpus, Document
from lsjax.training.gaps import gapped_positions


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the next token is to be read: all that is needed to go on from there.

    Attributes:
      epoch: how many times all documents have been read.
      document: its number in the epoch's order.
      offset: of the token in the document.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0


class Packer:
    """Rows of a corpus, whose documents come in another order every epoch.

    Attributes:
      corpus: the documents.
      length: tokens of a row.
      seed: of the order and of the gaps.
      span: positions of a piece have a gap that spreads them over up to so many; see
        gapped_positions. `length` for none.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int, span: int):
        self.corpus, self.length, self.seed, self.span = corpus, length, seed, span
        # A long document goes through many rows, and is read once.
        self._order = functools.lru_cache(1)(self._order_of)
        self._document = functools.lru_cache(1)(corpus.__getitem__)

    def take(self, place: Place, parts: int, rows: int) -> tuple[Batch, Place]:
        """The batch of one step.

        Args:
          place: where it begins.
          parts, rows: its shape is [parts, rows, length].

        Returns:
          The batch, and where the next one begins.

        Raises:
          UserError: a document is wrong, or all are empty.
        """
        shape = parts, rows, self.length
        batch = Batch(*(np.zeros(shape, np.int32) for _ in range(4)), np.zeros(shape, np.float32))
        for part in range(parts):
            for row in range(rows):
                place = self._fill(place, part, row, batch)
        return batch, place

    def _order_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.corpus))

    def _fill(self, place: Place, part: int, row: int, batch: Batch) -> Place:
        filled, empty_since = 0, place.epoch
        while filled < self.length:
            if place.document == len(self.corpus):
                if not filled and place.epoch > empty_since:
                    raise UserError("the data hold no token: every document is empty.")
                place = Place(epoch=place.epoch + 1)
            document = self._document(int(self._order(place.epoch)[place.document]))
            count = min(len(document.ids) - place.offset, self.length - filled)
            at = part, row, slice(filled, filled + count)
            _write(document, place.offset, count, at, batch)
            batch.begin[at] = filled
            batch.positions[at] = self._positions(place, count)
            filled += count
            place = dataclasses.replace(place, offset=place.offset + count)
            if place.offset == len(document.ids):
                place = Place(place.epoch, place.document + 1)
        return place

    def _positions(self, place: Place, count: int) -> np.ndarray:
        if self.span == self.length:
            return np.arange(count)
        rng = np.random.default_rng([self.seed, *dataclasses.astuple(place)])
        return gapped_positions(rng, 1, count, self.span)[0]


def first_tokens(documents: list[Document], rows: int, length: int) -> Batch:
    """The beginning of each document, a row each.

    Args:
      documents: of at least `length` tokens each, at most `rows` of them; other rows are empty,
        with weights of 0.
      rows, length: of the batch.
    """
    shape = rows, length
    batch = Batch(*(np.zeros(shape, np.int32) for _ in range(4)), np.zeros(shape, np.float32))
    batch.positions[:] = np.arange(length)
    for row, document in enumerate(documents):
        _write(document, 0, length, (row, slice(length)), batch)
    return batch


def _write(document: Document, offset: int, count: int, at: tuple, batch: Batch) -> None:
    """Tokens from `offset` on, and what follows each; nothing follows the document's last."""
    batch.tokens[at] = document.ids[offset : offset + count]
    following = slice(offset + 1, offset + 1 + count)
    last = min(count, len(document.ids) - offset - 1)
    batch.targets[at][:last] = document.ids[following]
    batch.weights[at][:last] = document.weights[following]
