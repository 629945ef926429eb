"""The decoder: maps token ids and a KV cache to hidden states and the updated cache."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention.differentiable import self_attention
from lsjax.cache import KVCache, LayerCache
from lsjax.config import ModelConfig
from lsjax.nn.attention import LayerInputs, SelfAttention
from lsjax.nn.block import Block
from lsjax.nn.linear import Embedding, RMSNorm
from lsjax.positions.alibi import layer_slopes
from lsjax.positions.rotary import RotaryTables

# (decoder, x, inputs of each layer, cache) -> x after the last layer and the cache
LayerRunner = Callable[..., tuple[jax.Array, KVCache | None]]


class Decoder(nn.Module):
    """A decoder-only transformer of any supported family.

    Layers are unrolled, each with its own cache entry: scanning over stacked layers would
    copy the cache into and out of the loop.

    Attributes:
      config: model configuration.
      mesh: device mesh; see lsjax.distributed.sharding.
      dtype: dtype of parameters and activations.
      all_gather_weights: (layer name, its parameters) -> the parameters gathered over the context
        axis, used in prefill; None if they are not sharded over it.
      heads: query heads of each layer in their stored order; None for the checkpoint's order.
      self_attention: attention of whole rows, without a cache.
    """

    config: ModelConfig
    mesh: Mesh
    dtype: jnp.dtype
    all_gather_weights: Callable[[str, dict], dict] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    self_attention: SelfAttention = self_attention

    def setup(self):
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.dtype, self.mesh)
        self.layers = [Block(c, self.mesh, kind, self.self_attention) for kind in c.layers]
        self.final_norm = RMSNorm(c.norm_eps, c.zero_centered_norms)
        if not c.tie_embeddings:
            self.lm_head = Embedding(
                c.vocab_size, c.hidden_size, self.dtype, self.mesh, c.normalized_head
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
        """Runs all layers on new tokens.

        Args:
          tokens: [batch, length] token ids.
          positions: [batch, length]; see update_and_attend for the allowed values.
          tables: rotary tables of the requests in the batch.
          cache: KV cache with all earlier tokens; None if the tokens are whole rows and
            gradients are needed.
          lengths: [batch] total number of tokens in each row; later ones are padding. Or None.
          decode: whether these are the few tokens of a decode step, not a prefill chunk.
          begin: [batch, length] index in the row of the first token that each token sees, used
            without a cache; None if all see from the row's first token.

        Returns:
          [batch, length, hidden] hidden states after the final norm, and the cache with the new
          tokens written.
        """
        inputs = LayerInputs(lengths=lengths, begin=begin, decode=decode)
        layers = self.layer_inputs(tables, positions, inputs)
        return self.run(self.embed_tokens(tokens), layers, cache)

    def run(
        self,
        x: jax.Array,
        inputs: Sequence[LayerInputs],
        cache: KVCache | None,
        run_layers: LayerRunner | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs all layers on [batch, length, hidden] embeddings; results as of `__call__`.

        Args:
          x: embeddings.
          inputs: inputs of each layer.
          cache: see `__call__`.
          run_layers: runs the layers; None to run them one after the other, unrolled.
        """
        x, cache = (run_layers or run_unrolled)(self, x, inputs, cache)
        return self.apply_final_norm(x), cache

    def layer_inputs(
        self,
        tables: RotaryTables,
        positions: jax.Array | None = None,
        inputs: LayerInputs = LayerInputs(),  # noqa: B008 (frozen)
    ) -> Sequence[LayerInputs]:
        """Returns the inputs of each layer, with their angles if positions are known."""
        c = self.config
        if not c.alibi:
            inputs = inputs.replace(tables=tables)
        if positions is not None:
            inputs = inputs.at(positions)
        if not c.alibi:
            return [inputs] * c.num_layers
        return [inputs.replace(slopes=slopes) for slopes in layer_slopes(c, self.heads)]

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embeds [batch, length] token ids as [batch, length, hidden], the first layer's input."""
        return self.embed(tokens)

    def apply_final_norm(self, hidden: jax.Array) -> jax.Array:
        """Applies the final norm to the last layer's output."""
        return self.final_norm(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns [batch, length, vocab] float32 logits of hidden [batch, length, hidden]."""
        head = self.embed if self.config.tie_embeddings else self.lm_head
        return head.logits(hidden)


def run_unrolled(decoder, x, inputs, cache):
    """Runs the layers of a bound decoder one after the other; see LayerRunner."""
    # To initialize parameters or record intermediates, the bound modules themselves must run.
    recorded = any(map(decoder.is_mutable_collection, ("params", "intermediates")))
    entries = []
    for i, layer in enumerate(decoder.layers):
        args = x, inputs[i], None if cache is None else cache[i]
        if recorded:
            x, entry = layer(*args)
        else:
            x, entry = run_layer(decoder, i, layer.variables["params"], *args)
        entries.append(entry)
    return x, None if cache is None else tuple(entries)


def run_layer(
    decoder: Decoder,
    i: int,
    weights: dict,
    x: jax.Array,
    inputs: LayerInputs,
    cache: LayerCache | None,
) -> tuple[jax.Array, LayerCache | None]:
    """Runs layer i of a decoder, whose module need not be bound, with its weights.

    In prefill the weights are gathered over the context axis first. Layers that are alike are
    traced and lowered once.
    """
    if decoder.all_gather_weights and cache is not None and not inputs.decode:
        # Wait for the layer's input: XLA would otherwise hold gathered weights of many layers.
        x, weights = jax.lax.optimization_barrier((x, weights))
        weights = decoder.all_gather_weights(f"layers_{i}", weights)
    kind = decoder.config.layers[i]
    block = Block(decoder.config, decoder.mesh, kind, decoder.self_attention, parent=None)
    return _run_block(block, weights, x, inputs, cache)


@functools.partial(jax.jit, static_argnums=0)
def _run_block(block, weights, x, inputs, cache):
    return block.apply({"params": weights}, x, inputs, cache)
