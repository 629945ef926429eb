"""A mixture of experts: a router sends each token to a few of many gated MLPs.

Source: transformers' modeling_qwen3_moe.py; the load-balancing loss is that of arXiv 2101.03961.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lsjax.distributed.sharding import CHUNK_SPEC, TOKENS_SPEC, parameter_spec
from lsjax.families.qwen_moe import Experts
from lsjax.nn.gated_mlp import GatedMLP, gated
from lsjax.nn.grouped_product import grouped_product
from lsjax.nn.linear import Linear
from lsjax.runtime.precision import einsum

_AXES = ("mlp", None, None)


class _Matrices(nn.Module):
    """The matrices [expert, out, in] of one projection, with the scales of int8 ones or None."""

    shape: tuple[int, int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        init = nn.with_partitioning(nn.initializers.normal(0.02), _AXES)
        weight = self.param("weight", init, self.shape, self.dtype)
        return weight, self.get_variable("params", "scale")


class Router(nn.Module):
    """Gives the probability of each expert, [..., experts] float32, for tokens [..., hidden]."""

    experts: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        weight = self.param("weight", init, (self.experts, x.shape[-1]), x.dtype)
        # In float32 throughout: a rounded product could choose other experts on another mesh.
        wide = x.astype(jnp.float32), weight.astype(jnp.float32)
        logits = jnp.einsum("...i,oi->...o", *wide, precision="highest")
        return jax.nn.softmax(logits, axis=-1)


class MixtureOfExperts(nn.Module):
    """Computes sum_e p_e down_e(silu(gate_e(x)) * up_e(x)) over the experts chosen for a token.

    An expert that all tokens share is added, times the sigmoid of its gate. The others are split
    over the `model` axis: a device computes its own for all tokens that it has.
    """

    experts: Experts
    mesh: Mesh

    takes_scaled = False

    def setup(self):
        self.router = Router(self.experts.count)
        if self.experts.shared_width:
            self.shared = GatedMLP(self.experts.shared_width)
            self.shared_gate = Linear(1, (None, "embed"))

    @nn.compact
    def __call__(self, x: jax.Array, decode: bool = False) -> jax.Array:
        """Runs [batch, length, hidden]; in decode the tokens are on all devices of a context."""
        e, hidden = self.experts, x.shape[-1]
        inner, outer = (e.count, e.width, hidden), (e.count, hidden, e.width)
        shapes = {"gate": inner, "up": inner, "down": outer}
        weights = [_Matrices(shape, x.dtype, name=name)() for name, shape in shapes.items()]
        probabilities, chosen = choose_experts(e, self.router(x))

        rows = parameter_spec(self.mesh, _AXES, inner)[0] if decode else "model"
        axes = rows if isinstance(rows, tuple) else (rows,)
        whole = decode or x.shape[1] % self.mesh.shape["context"]
        tokens = TOKENS_SPEC if whole else CHUNK_SPEC
        mesh, mapped = self.mesh, set(self.mesh.axis_names)
        if (outside := jax.sharding.get_abstract_mesh()).manual_axes:  # training maps over tokens
            mesh, mapped, tokens = outside, {"model"}, PartitionSpec()
        run = jax.shard_map(
            functools.partial(_run_local_experts, axes=axes),
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, PartitionSpec(rows)),
            out_specs=tokens,
            axis_names=mapped,
            check_vma=False,
        )
        y = run(x, probabilities, chosen, weights)
        if e.shared_width:
            y = y + nn.sigmoid(self.shared_gate(x)) * self.shared(x)
        return y

    def loss_terms(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns how evenly tokens are spread: [experts] tokens each has, and its probability.

        Both are float32 sums over the tokens of x [batch, length, hidden]; see balance_loss.
        """
        probabilities = self.router(x)
        _, chosen = choose_experts(self.experts, probabilities)
        counts = jnp.zeros(self.experts.count).at[chosen].add(1.0)
        return counts, jnp.sum(probabilities, axis=(0, 1))


def choose_experts(experts: Experts, probabilities: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the weights and ids, [..., per_token], of the most probable experts.

    Of experts with the same probability, the one with the lower id comes first.
    """
    top, chosen = jax.lax.top_k(probabilities, experts.per_token)
    if experts.renormalized:
        top = top / jnp.sum(top, axis=-1, keepdims=True)
    return top, chosen


def balance_loss(experts: Experts, terms: tuple[jax.Array, jax.Array], tokens: int) -> jax.Array:
    """Returns the load-balancing loss, times its weight.

    Without the weight it is `per_token` for a router that spreads tokens evenly.

    Args:
      experts: the mixture.
      terms: sums over layers of what MixtureOfExperts.loss_terms returns.
      tokens: number of tokens, times that of layers.
    """
    counts, probabilities = terms
    even = counts.shape[0] * jnp.sum(counts / tokens * probabilities / tokens)
    return experts.balance_weight * even


def _run_local_experts(x, probabilities, chosen, weights, *, axes):
    """Runs the experts of one device, and sums over the mesh `axes`; called under shard_map."""
    local = weights[0][0].shape[0]
    tokens, per_token = x.shape[0] * x.shape[1], chosen.shape[-1]
    ids = chosen.reshape(-1) - jax.lax.axis_index(axes) * local
    here = (ids >= 0) & (ids < local)
    share = jnp.where(here, probabilities.reshape(-1), 0.0)
    vectors = x.reshape(tokens, -1)
    # Weights of experts that no token chose are not read, if those chosen are the fewer.
    run = _run_chosen if tokens * per_token <= local else _run_sorted
    y = run(vectors, jnp.where(here, ids, local), weights)
    y = jnp.where(here[:, None], y, 0.0) * share[:, None]
    y = jnp.sum(y.reshape(tokens, per_token, -1), axis=1)
    return jax.lax.psum(y, axes).reshape(x.shape).astype(x.dtype)


def _run_chosen(x, ids, weights):
    """Runs x [tokens, hidden] through the experts `ids` [tokens * per_token] of a device.

    The result is [tokens * per_token, hidden] float32, and without meaning where an id is past the
    last expert.
    """
    rows = jnp.repeat(x, ids.size // x.shape[0], axis=0)
    return jax.lax.platform_dependent(rows, ids, weights, cuda=_gathered, default=_one_by_one)


def _gathered(x, ids, weights):
    """Runs each row of x through its expert, all rows at once.

    A product is written as a sum, into which XLA for a GPU fuses the reading of the matrices.
    """
    ids = jnp.minimum(ids, weights[0][0].shape[0] - 1)

    def project(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
        matrices = weight[ids].astype(jnp.float32)
        y = jnp.sum(matrices * x.astype(jnp.float32)[:, None], axis=-1)
        return y if scale is None else y * scale[ids]

    return _gated(project, x, weights)


def _one_by_one(x, ids, weights):
    """Does what `_gathered` does, row by row: XLA for a TPU or a CPU would copy all matrices.

    Nothing is read for a row whose expert another device has.
    """
    local = weights[0][0].shape[0]

    def one(of: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, expert = of
        none = jnp.zeros(row.shape, jnp.float32)
        # Without a condition XLA on a CPU would widen bfloat16 matrices of all experts at once.
        return jax.lax.cond(expert < local, run, lambda *_: none, row, expert)

    def run(row: jax.Array, expert: jax.Array) -> jax.Array:
        def project(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
            matrix = jax.lax.dynamic_index_in_dim(weight, expert, keepdims=False)
            y = einsum("i,oi->o", x, matrix.astype(x.dtype))
            return y if scale is None else y * scale[expert]

        return _gated(project, row, weights)

    return jax.lax.map(one, (x, ids))


def _run_sorted(x, ids, weights):
    """Does what `_run_chosen` does for many tokens, which are sorted by expert."""
    order = jnp.argsort(ids, stable=True)
    sizes = jnp.bincount(ids, length=weights[0][0].shape[0])  # leaves out ids past the last
    sorted_ids = jnp.minimum(ids[order], sizes.size - 1)

    def project(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
        y = grouped_product(x, weight, sizes)
        return y if scale is None else y * scale[sorted_ids]

    y = _gated(project, x[order // (ids.size // x.shape[0])], weights)
    return y[jnp.argsort(order)]


def _gated(project, x, weights):
    gate, up, down = weights
    gate, up = (project(x, *weight).astype(x.dtype) for weight in (gate, up))
    return project(gated(gate, up), *down)
