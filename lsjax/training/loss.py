"""The loss of each target."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lsjax.config import ModelConfig
from lsjax.nn.decoder import Decoder
from lsjax.positions.rotary import RotaryTables
from lsjax.training.batch import Batch


class Loss:
    """(params, batch, tables) -> [rows, length] losses of the targets in nats."""

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: str):
        self._dtype = jnp.dtype(dtype)
        self._decoder = Decoder(config, mesh, self._dtype)

    def __call__(self, params: dict, batch: Batch, tables: RotaryTables) -> jax.Array:
        params = {"params": jax.tree.map(lambda x: x.astype(self._dtype), params)}
        hidden, _ = self._decoder.apply(
            params, batch.tokens, batch.positions, tables, None, begin=batch.begin
        )
        logits = self._decoder.apply(params, hidden, method="logits")
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
