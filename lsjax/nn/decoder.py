"""The decoder: token ids and a cache in, hidden states and the cache out."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.cache import KVCache
from lsjax.config import ModelConfig
from lsjax.nn.attention import Places
from lsjax.nn.block import Block
from lsjax.nn.linear import Embedding, RMSNorm
from lsjax.positions.alibi import layer_slopes
from lsjax.positions.rotary import RotaryTables, cos_sin


class Decoder(nn.Module):
    """A decoder-only transformer of any of the families.

    Layers are unrolled, each with a cache entry of its own: scanning over stacked layers would
    copy the cache into and out of the loop.

    Attributes:
      config: the model.
      mesh: see lsjax.sharding.
      dtype: of parameters and activations.
      gather: (name of a layer, its parameters) -> those to run it with in prefill, brought
        together from where they lie; None where they are whole.
      heads: of each layer, its query heads in the order that they stand in; None where they stand
        as the checkpoint has them.
    """

    config: ModelConfig
    mesh: Mesh
    dtype: jnp.dtype
    gather: Callable[[str, dict], dict] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None

    def setup(self):
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.dtype, self.mesh)
        self.layers = [Block(c, self.mesh, window) for window in c.windows]
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Embedding(
                c.vocab_size, c.hidden_size, self.dtype, self.mesh, c.normalised_head
            )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        tables: RotaryTables,
        cache: KVCache | None,
        lengths: jax.Array | None = None,
        decode: bool = False,
        begin: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs new tokens.

        Args:
          tokens: [batch, length] ids.
          positions: [batch, length]; see lsjax.attention.cached for what they may be.
          tables: of the requests in the batch.
          cache: holding everything before; None where the tokens are whole rows and gradients
            are wanted.
          lengths: [batch] tokens of each row in all, where later ones only fill a chunk up.
          decode: whether these are the few tokens of a decode step, not a prefill chunk.
          begin: [batch, length] without a cache, the first token of its row that each sees; None
            for that of the row.

        Returns:
          [batch, length, hidden] hidden states after the last norm, and the cache with the new
          tokens written.
        """
        x = self.embed_tokens(tokens)
        places = self._places(tables, positions)
        # Whatever is recorded on the way, as parameters are at first, the modules do themselves.
        recorded = any(map(self.is_mutable_collection, ("params", "intermediates")))
        entries = []
        for i, layer in enumerate(self.layers):
            run = layer if recorded else functools.partial(self._run, i)
            entry = None if cache is None else cache[i]
            x, entry = run(x, positions, places[i], entry, lengths, decode, begin)
            entries.append(entry)
        return self.normed(x), None if cache is None else tuple(entries)

    def _places(self, tables: RotaryTables, positions: jax.Array) -> Sequence[Places]:
        """Of each layer, see Attention."""
        c = self.config
        if not c.alibi:
            return [cos_sin(tables, positions)] * c.num_layers
        return layer_slopes(c, self.heads)

    def _run(self, i: int, x, positions, places, entry, lengths, decode, begin):
        """Layer i; arguments and result as of Block."""
        weights = self.layers[i].variables["params"]
        if self.gather and entry is not None and not decode:
            # Brought together once the layer's input is there: XLA would hold those of many layers.
            x, weights = jax.lax.optimization_barrier((x, weights))
            weights = self.gather(f"layers_{i}", weights)
        block = Block(self.config, self.mesh, self.config.windows[i], parent=None)
        return _run_block(block, decode, weights, x, positions, places, entry, lengths, begin)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """[batch, length] ids -> [batch, length, hidden], what the first layer gets."""
        return self.embed(tokens)

    def normed(self, hidden: jax.Array) -> jax.Array:
        """What the last layer gives, after the last norm."""
        return self.final_norm(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[batch, length, hidden] -> [batch, length, vocab] float32."""
        head = self.embed if self.config.tie_embeddings else self.lm_head
        return head.logits(hidden)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_block(block, decode, weights, x, positions, places, entry, lengths, begin):
    """Traced and lowered once for all layers that are alike."""
    return block.apply({"params": weights}, x, positions, places, entry, lengths, decode, begin)
