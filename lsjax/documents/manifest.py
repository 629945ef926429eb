"""What is saved of a document, as its `document.json` says."""

import dataclasses
from collections.abc import Sequence

FORMAT = 1
PARTS = 4  # of a document, in each of which the last snapshot of recurrent states is kept


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `document.json` says.

    Attributes:
      fingerprint: what keys and values depend on.
      ids: hash of the token ids.
      tokens: number of token ids.
      cached: number of tokens whose keys and values are saved once the document is complete.
      done: number of tokens whose keys and values are saved so far.
      slice: tokens per slice.
      settled_length: see Document.
      states: numbers of tokens that there are snapshots after, in order.
      format: version of the format.
    """

    fingerprint: dict[str, str]
    ids: str
    tokens: int
    cached: int
    done: int
    slice: int
    settled_length: int | None
    states: tuple[int, ...] = ()
    format: int = FORMAT

    def last_state(self, tokens: int, multiple: int = 1) -> int:
        """Returns the longest beginning within some tokens that there is a snapshot after, or 0.

        Except for all of the tokens, it is to be a multiple of a number of tokens.
        """
        most = min(tokens, self.done)
        usable = (at for at in self.states if at <= most and (at == tokens or at % multiple == 0))
        return max(usable, default=0)


def last_of_parts(states: Sequence[int], cached: int) -> tuple[int, ...]:
    """Returns which snapshots are kept: the last in each part of a document, and that at its end.

    So the latest one is always kept, and a document that differs is read from one not far before.
    """
    return tuple({at * PARTS // cached: at for at in sorted(states)}.values())
