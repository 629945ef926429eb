"""Loss on held-out documents, by the length that they are cut to."""

from collections.abc import Sequence

import numpy as np

from lsjax.distributed.multihost import to_host
from lsjax.runtime.errors import UserError
from lsjax.training.batch import Batch
from lsjax.training.documents import Corpus
from lsjax.training.packing import first_tokens
from lsjax.training.step import Trainer

# Length -> batches whose rows are the first tokens of the documents that are long enough.
HeldOut = dict[int, tuple[Batch, ...]]


def hold_out(corpus: Corpus, lengths: Sequence[int], rows: int) -> HeldOut:
    """Cuts documents to each length, with `rows` documents per batch.

    Raises:
      UserError: no document is long enough for one of the lengths.
    """
    documents = [corpus[i] for i in range(len(corpus))]
    batches: HeldOut = {}
    for length in lengths:
        found = [d for d in documents if len(d.ids) >= length]
        if not found:
            longest = max(len(d.ids) for d in documents)
            raise UserError(
                f"no document of eval_data has {length:,} tokens, the longest has {longest:,}; "
                "leave that length out of eval_lengths, or give longer documents."
            )
        cut = [found[i : i + rows] for i in range(0, len(found), rows)]
        batches[length] = tuple(first_tokens(part, rows, length) for part in cut)
    return batches


def losses_by_length(trainer: Trainer, params: dict, held_out: HeldOut) -> dict[int, float]:
    """Returns the weighted mean loss of the targets for each length, in nats."""
    means = {}
    for length, batches in held_out.items():
        tables = trainer.tables(length)
        total = weight = 0.0
        for batch in batches:
            losses = to_host(trainer.losses(params, batch, tables))
            total += float(np.sum(losses * batch.weights, dtype=np.float64))
            weight += float(np.sum(batch.weights, dtype=np.float64))
        means[length] = total / weight if weight else float("nan")
    return means
