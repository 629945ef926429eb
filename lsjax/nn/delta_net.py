"""Gated DeltaNet: a layer that brings tokens together by a recurrence instead of attention.

Source: arXiv 2412.06464; transformers' modeling_qwen3_5.py.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lsjax.cache import RecurrentState, empty_state
from lsjax.config import ModelConfig
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import CHUNK_QUERIES_SPEC, STATE_AXES, TOKENS_SPEC
from lsjax.families.qwen3_5 import DeltaNet
from lsjax.nn.attention import LayerInputs
from lsjax.nn.delta_rule import DeltaInputs, run_chunks, run_steps
from lsjax.nn.linear import Linear, RMSNorm

_EPSILON = 1e-6  # of the norms of queries and keys, whatever config.json says


class GatedDeltaNet(nn.Module):
    """Projections, a causal convolution, the gated delta rule, a gated norm, output projection.

    Everything is laid out by key head: the value heads that share one are side by side.
    """

    net: DeltaNet
    config: ModelConfig
    mesh: Mesh

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: LayerInputs, state: RecurrentState | None
    ) -> tuple[jax.Array, RecurrentState | None]:
        """Maps [batch, length, hidden] to the same shape, and runs the tokens through the state.

        Tokens past `inputs.lengths` leave the state as it is. Without a state the tokens are whole
        rows, in which documents may begin (`inputs.begin`): they see nothing of those before them.
        """
        net, (batch, length, hidden) = self.net, x.shape
        widths = {"q": net.key_dim, "k": net.key_dim, "v": net.group * net.value_dim}

        def project(name: str, width: int) -> jax.Array:
            y = Linear(net.key_heads * width, ("kv_heads", "embed"), name=name)(x)
            return y.reshape(batch, length, net.key_heads, width)

        def taps(name: str, width: int) -> jax.Array:
            init = nn.with_partitioning(nn.initializers.normal(0.02), ("kv_heads", None, None))
            shape = net.key_heads * width, 1, net.conv_width
            return self.param(f"{name}_conv", init, shape, x.dtype).reshape(
                net.key_heads, width, net.conv_width
            )

        def rate(name: str) -> jax.Array:
            ones = nn.with_partitioning(nn.initializers.ones, ("kv_heads",))
            y = self.param(name, ones, (net.value_heads,), jnp.float32)
            return y.reshape(net.key_heads, net.group)

        sizes = widths | {"b": net.group, "a": net.group}
        tokens = jnp.concatenate([project(*size) for size in sizes.items()], axis=-1)
        # XLA would fuse it with the norms of queries and keys, which Triton does not compile.
        conv = jnp.concatenate([taps(*size) for size in widths.items()], axis=1)
        conv = jax.lax.optimization_barrier(conv)
        weights = conv, rate("A_log"), rate("dt_bias")
        y, state = self._recur(tokens, weights, inputs, state)
        gate = project("z", net.group * net.value_dim)
        shape = batch, length, net.value_heads, net.value_dim
        y = RMSNorm(self.config.norm_eps, name="norm")(y.reshape(shape))
        y = (y * nn.silu(gate.reshape(shape).astype(jnp.float32))).astype(x.dtype)
        return Linear(hidden, ("embed", "heads"), name="o")(y.reshape(batch, length, -1)), state

    def _recur(self, tokens, weights, inputs, state):
        """Runs the recurrence on the mesh; see `_on_device`."""
        devices, (batch, length) = self.mesh.shape["context"], tokens.shape[:2]
        exchange = devices > 1 and not inputs.decode
        held = state or empty_state(self.net, batch, tokens.dtype, Zigzag(devices, length))
        by_head, specs = PartitionSpec("data", None, STATE_AXES), held.partition_specs()
        drafted = inputs.decode and length > 1
        spec = CHUNK_QUERIES_SPEC if exchange else by_head
        run = jax.shard_map(
            functools.partial(_on_device, decode=inputs.decode, exchange=exchange),
            mesh=self.mesh,
            in_specs=(spec, PartitionSpec(STATE_AXES), *(TOKENS_SPEC,) * 3, specs),
            out_specs=(spec, specs.replace(draft=by_head if drafted else None)),
            check_vma=False,
        )
        y, after = run(tokens, weights, inputs.positions, inputs.lengths, inputs.begin, held)
        return y, state and after

    @staticmethod
    def keep_accepted(state: RecurrentState, counts: jax.Array) -> RecurrentState:
        """Runs the first `counts` [batch] tokens of the state's draft; see layer_modules."""
        inputs, mixed = state.draft
        _, matrix = run_steps(state.arrays["matrix"], _first(inputs, counts))
        return _after(state, matrix, mixed, counts)


def _on_device(tokens, weights, positions, lengths, begin, state, *, decode, exchange):
    """Runs one device's heads; called under shard_map.

    A recurrence is sequential, so the tokens of a prefill chunk that is sharded over the context
    axis are exchanged for heads: each device runs all tokens, in order, through some heads.

    Args:
      tokens: [batch, length, key_heads, channels] queries, keys, values, and logits of the rates.
      weights: taps of the convolution and the two parameters of the decay, by key head.
      positions: [batch, length] of all devices' tokens, in the order of `tokens`.
      lengths: [batch] number of tokens in each row, or None.
      begin: like `positions`, index of the first token that each token sees, or None.
      state: RecurrentState of the device's heads.
      decode: whether these are the few tokens of a decode step.
      exchange: whether tokens are sharded over the context axis.
    """
    dtype, (batch, length), since = tokens.dtype, positions.shape, None
    if exchange:
        order = state.zigzag.permutation(length)
        back = np.argsort(order)
        tokens = jax.lax.all_to_all(tokens, "context", 2, 1, tiled=True)[:, back]
        positions, begin = jax.tree.map(lambda x: x[:, back], (positions, begin))
    if begin is not None:
        since = jnp.arange(length) - begin
    inputs, mixed = _prepare(tokens, weights, state, since)
    counts = jnp.full(batch, length)
    if lengths is not None:
        counts = jnp.sum(positions < lengths[:, None], axis=1)
        inputs = _first(inputs, counts)
    if decode:
        y, matrix = run_steps(state.arrays["matrix"], inputs)
    else:
        starts = None if since is None else since == 0
        y, matrix = run_chunks(state.arrays["matrix"], inputs, starts)
    y = y.reshape(*y.shape[:3], -1).astype(dtype)
    if exchange:
        y = jax.lax.all_to_all(y[:, order], "context", 1, 2, tiled=True)
    if decode and length > 1:  # a draft, of which the next step may keep less
        return y, state.replace(draft=(inputs, mixed))
    after = _after(state, matrix, mixed, counts)
    if decode:
        return y, after
    # XLA for a GPU would take the last tokens at the program's end, and hold `mixed` of all layers.
    return jax.lax.optimization_barrier((y, after))


def _prepare(tokens, weights, state, since):
    """Returns what tokens bring to the delta rule, and the inputs of the convolution.

    `since` is the number of tokens before each one in its document, [batch, length], or None.
    """
    taps, log_rate, bias = weights
    length, (*_, group, value_dim, key_dim) = tokens.shape[1], state.arrays["matrix"].shape
    channels = taps.shape[1]
    mixed, beta, rate = jnp.split(tokens, [channels, channels + group], axis=-1)
    mixed = jnp.concatenate([state.arrays["recent"], mixed], axis=1)
    wide, taps = mixed.astype(jnp.float32), taps.astype(jnp.float32)
    y, width = 0.0, taps.shape[-1]
    for i in range(width):
        x = wide[:, i : i + length]
        if since is not None:
            x = jnp.where((since >= width - 1 - i)[..., None, None], x, 0)
        y = y + x * taps[..., i]
    q, k, v = jnp.split(nn.silu(y), [key_dim, 2 * key_dim], axis=-1)
    inputs = DeltaInputs(
        q=_normalized(q) * key_dim**-0.5,
        k=_normalized(k),
        v=v.reshape(*v.shape[:3], group, value_dim),
        log_decay=-jnp.exp(log_rate) * nn.softplus(rate.astype(jnp.float32) + bias),
        beta=nn.sigmoid(beta.astype(jnp.float32)),
    )
    return inputs, mixed


def _normalized(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPSILON)


def _first(inputs: DeltaInputs, counts: jax.Array) -> DeltaInputs:
    """Returns tokens of which those after the first `counts` [batch] leave the state as it is."""
    real = (jnp.arange(inputs.k.shape[1]) < counts[:, None])[..., None, None]
    beta, log_decay = (jnp.where(real, x, 0) for x in (inputs.beta, inputs.log_decay))
    return inputs.replace(beta=beta, log_decay=log_decay)


def _after(
    state: RecurrentState, matrix: jax.Array, mixed: jax.Array, counts: jax.Array
) -> RecurrentState:
    """Returns the state after `counts` [batch] tokens: its matrix, and the convolution's inputs."""
    at = counts[:, None] + jnp.arange(state.arrays["recent"].shape[1])
    recent = jnp.take_along_axis(mixed, at[..., None, None], axis=1)
    return state.replace(arrays={"matrix": matrix, "recent": recent}, draft=None)
