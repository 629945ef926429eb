"""The batch of a training step."""

import flax.struct
import jax
import numpy as np

_LONG = 4096  # tokens of a row per device above which the ring moves keys in several blocks


def length_unit(length: int, context: int) -> int:
    """Returns the number that must divide a row's length to shard it over the context axis.

    The ring moves long rows in blocks whose size divides the tokens per device. A length with
    small factors would make these blocks tiny.
    """
    return 256 * context if context > 1 and length > _LONG * context else 2 * context


@flax.struct.dataclass
class Batch:
    """Rows of tokens. Each row holds one document, or several one after another.

    Token i of a row sees the tokens begin[i] .. i of its row, as far as a layer's window reaches.
    The batch of a training step has one more axis in front: the parts whose gradients are summed.

    Attributes:
      tokens: [rows, length] int32 ids.
      targets: [rows, length] int32 ids, the token that should follow each token.
      positions: [rows, length] int32 positions for RoPE; they start again at each document and
        may have gaps.
      begin: [rows, length] int32 index in the row at which the token's document begins.
      weights: [rows, length] float32 weight of each target; 0 leaves it out.
    """

    tokens: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    positions: np.ndarray | jax.Array
    begin: np.ndarray | jax.Array
    weights: np.ndarray | jax.Array
