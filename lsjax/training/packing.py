"""Packs documents into rows of tokens, starting at any position in the corpus.

Every row is full. When a row ends within a document, the rest continues in the next row as a piece
of its own, which does not see the previous piece; the last target of a piece is the first token of
the next one. So each epoch reads every token once, and predicts every token but a document's first
once.
"""

import dataclasses
import functools

import numpy as np

from lsjax.runtime.errors import UserError
from lsjax.training.batch import Batch
from lsjax.training.documents import Corpus, Document
from lsjax.training.pose import gapped_positions


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """The position of the next token to read: all that is needed to resume there.

    Attributes:
      epoch: how many times all documents have been read.
      document: index of the document in the epoch's order.
      offset: index of the token in the document.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0


class Packer:
    """Makes batches from a corpus, whose documents are shuffled anew every epoch.

    Attributes:
      corpus: the documents.
      length: tokens per row.
      seed: random seed for the order of documents and the PoSE gaps.
      span: positions of a piece are spread over up to `span` by one gap, see gapped_positions;
        equal to `length` for no gap.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int, span: int):
        self.corpus, self.length, self.seed, self.span = corpus, length, seed, span
        # A long document fills many rows, but is read once.
        self._order = functools.lru_cache(1)(self._order_of)
        self._document = functools.lru_cache(1)(corpus.__getitem__)

    def take(
        self, data_position: DataPosition, parts: int, rows: int
    ) -> tuple[Batch, DataPosition]:
        """Makes the batch of one step.

        Args:
          data_position: where the batch begins.
          parts, rows: the batch has the shape [parts, rows, length].

        Returns:
          The batch, and the position where the next one begins.

        Raises:
          UserError: a document is invalid, or all documents are empty.
        """
        shape = parts, rows, self.length
        batch = Batch(*(np.zeros(shape, np.int32) for _ in range(4)), np.zeros(shape, np.float32))
        for part in range(parts):
            for row in range(rows):
                data_position = self._fill(data_position, part, row, batch)
        return batch, data_position

    def _order_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.corpus))

    def _fill(self, data_position: DataPosition, part: int, row: int, batch: Batch) -> DataPosition:
        filled, empty_since = 0, data_position.epoch
        while filled < self.length:
            if data_position.document == len(self.corpus):
                if not filled and data_position.epoch > empty_since:
                    raise UserError("the data hold no token: every document is empty.")
                data_position = DataPosition(epoch=data_position.epoch + 1)
            document = self._document(int(self._order(data_position.epoch)[data_position.document]))
            count = min(len(document.ids) - data_position.offset, self.length - filled)
            at = part, row, slice(filled, filled + count)
            _write(document, data_position.offset, count, at, batch)
            batch.begin[at] = filled
            batch.positions[at] = self._positions(data_position, count)
            filled += count
            data_position = dataclasses.replace(data_position, offset=data_position.offset + count)
            if data_position.offset == len(document.ids):
                data_position = DataPosition(data_position.epoch, data_position.document + 1)
        return data_position

    def _positions(self, data_position: DataPosition, count: int) -> np.ndarray:
        if self.span == self.length:
            return np.arange(count)
        rng = np.random.default_rng([self.seed, *dataclasses.astuple(data_position)])
        return gapped_positions(rng, 1, count, self.span)[0]


def first_tokens(documents: list[Document], rows: int, length: int) -> Batch:
    """Makes a batch of the first tokens of each document, one row per document.

    Args:
      documents: at most `rows` documents with at least `length` tokens each. Rows without a
        document have zeros for tokens and weights.
      rows, length: shape of the batch.
    """
    shape = rows, length
    batch = Batch(*(np.zeros(shape, np.int32) for _ in range(4)), np.zeros(shape, np.float32))
    batch.positions[:] = np.arange(length)
    for row, document in enumerate(documents):
        _write(document, 0, length, (row, slice(length)), batch)
    return batch


def _write(document: Document, offset: int, count: int, at: tuple, batch: Batch) -> None:
    """Writes tokens from `offset` on and their targets; the document's last token has none."""
    batch.tokens[at] = document.ids[offset : offset + count]
    following = slice(offset + 1, offset + 1 + count)
    last = min(count, len(document.ids) - offset - 1)
    batch.targets[at][:last] = document.ids[following]
    batch.weights[at][:last] = document.weights[following]
