"""What one step of training reads."""

import flax.struct
import jax
import numpy as np

_LONG = 4096  # tokens of a row on a device from which on keys travel in pieces


def length_unit(length: int, context: int) -> int:
    """What a row's length is to be a multiple of, to be dealt out over a context axis.

    Long rows travel round the ring in pieces, which small factors would make tiny.
    """
    return 256 * context if context > 1 and length > _LONG * context else 2 * context


@flax.struct.dataclass
class Batch:
    """Rows of tokens, each of one document or of several, one behind the other.

    Token i of a row sees the tokens begin[i] .. i of its row, as far as a layer's window reaches.

    Attributes:
      tokens: [rows, length] int32 ids.
      targets: [rows, length] int32 ids, what is to follow each token.
      positions: [rows, length] int32 that tokens are rotated to; they begin anew with every
        document, and may have gaps.
      begin: [rows, length] int32, the index in the row at which a token's document begins.
      weights: [rows, length] float32, how much each target counts; 0 leaves it out.

    A step's batch has an axis before these: the parts that gradients are summed over.
    """

    tokens: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    positions: np.ndarray | jax.Array
    begin: np.ndarray | jax.Array
    weights: np.ndarray | jax.Array
