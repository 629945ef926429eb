"""What one step of training reads."""

import flax.struct
import jax
import numpy as np


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
