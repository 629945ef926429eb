"""The loss of each target, computed in little enough memory to train on long rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax.config import MLP, ModelConfig
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import CHUNK_SPEC, drop_axis, sharding
from lsjax.nn.attention import LayerInputs
from lsjax.nn.block import Block
from lsjax.nn.decoder import Decoder
from lsjax.nn.layer_modules import own_loss
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.positions.rotary import RotaryTables
from lsjax.training.batch import Batch
from lsjax.training.cross_entropy import cross_entropy
from lsjax.training.embedding import embed
from lsjax.training.layer_groups import repeated_groups
from lsjax.training.token_chunks import in_chunks


@dataclasses.dataclass(frozen=True)
class ChunkSizes:
    """Tokens per chunk and device.

    Attributes:
      mlp: tokens that run through an MLP at once.
      logits: tokens whose logits exist at once.
    """

    mlp: int = 4096
    logits: int = 1024


class Loss:
    """Computes (params, batch, tables) -> the losses of the targets, and the loss of the MLPs.

    The first are [rows, length] float32 in nats. The tokens of a row are in zigzag order, in the
    batch and in the result. The second is the sum of what MLPs add, see own_loss, 0 if none does.

    Only the input of each layer is kept; the layer is recomputed for its gradients. The layers run
    in a scan, forward and backward, so that XLA cannot see that a recomputed value already exists
    and keep it instead. On CPU it does so for unrolled layers, because it ignores optimization
    barriers there.

    Weights stay sharded and are gathered along the context axis one layer at a time, in the dtype
    of the computation. Their gradients are sharded like the weights.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: str, chunks: ChunkSizes):
        self._config, self._mesh, self._dtype = config, mesh, jnp.dtype(dtype)
        self._chunks = chunks
        self._decoder = Decoder(config, mesh, self._dtype)
        abstract = abstract_parameters(config, mesh, dtype)
        self._shardings = unflatten({path: x.sharding for path, x in abstract.items()})
        self._dtypes = unflatten({path: x.dtype for path, x in abstract.items()})

    def __call__(
        self, params: dict, batch: Batch, tables: RotaryTables
    ) -> tuple[jax.Array, jax.Array]:
        c = self._config
        narrow = jax.tree.map(lambda x, dtype: x.astype(dtype), params, self._dtypes)
        table = _whole(self._shardings["embed"]["weight"], narrow["embed"]["weight"])
        hidden = self._placed(embed(self._mesh, table, batch.tokens))
        inputs = LayerInputs(begin=batch.begin)
        layers = self._decoder.layer_inputs(tables, batch.positions, inputs)
        hidden, of_mlps = self._decoder.apply(
            {"params": narrow}, hidden, layers, None, self._scan, method="run"
        )
        head = table
        if not c.tie_embeddings:
            head = params["lm_head"]["weight"]
            if c.normalized_head:
                head = head / jnp.linalg.norm(head, axis=-1, keepdims=True)
            head = _whole(self._shardings["lm_head"]["weight"], head.astype(self._dtype))
        logits = self._chunks.logits
        return cross_entropy(self._mesh, logits, hidden, head, batch.targets), of_mlps

    def _scan(self, decoder, x, inputs, cache):
        """Runs the layers; see LayerRunner. The loss of the MLPs is in the cache's place.

        Groups of layers with parameters of the same shapes are one scan.
        """
        kinds = [dataclasses.replace(kind, window=None) for kind in self._config.layers]
        found: dict[MLP, list] = {}
        for groups in repeated_groups(kinds):
            x, terms = self._scan_groups(decoder, x, inputs[0], groups)
            for i, of_layer in zip(groups[0], terms, strict=True):
                if own_loss(kinds[i].mlp):
                    found.setdefault(kinds[i].mlp, []).append(of_layer)
        total = jnp.zeros(())
        for mlp, terms in found.items():
            layers = sum(len(jax.tree.leaves(of)[0]) for of in terms)
            sums = jax.tree.map(lambda *of: jnp.concatenate(of).sum(0), *terms)
            total += own_loss(mlp)(mlp, sums, x.shape[0] * x.shape[1] * layers)
        return x, total

    def _scan_groups(self, decoder, x, inputs, groups):
        """Runs groups of layers in a scan over the groups, which keeps only the layers' inputs."""
        layers = [self._layer(i, x.shape[1], inputs) for i in groups[0]]
        weights, params = [], decoder.variables["params"]
        for alike in zip(*groups, strict=True):
            of_layers = [params[f"layers_{i}"] for i in alike]
            where = self._shardings[f"layers_{alike[0]}"]
            stacked = jax.tree.map(lambda where, *of: _stacked(where, of), where, *of_layers)
            windows = jnp.asarray([self._config.windows[i] or x.shape[1] for i in alike])
            weights.append((stacked, windows))

        def group(x: jax.Array, of_group: list) -> tuple[jax.Array, list]:
            terms = []
            for layer, of_layer in zip(layers, of_group, strict=True):
                x, of_mlp = layer(x, of_layer)
                terms.append(of_mlp)
            return x, terms

        return jax.lax.scan(group, x, weights)

    def _layer(self, i, length, inputs):
        """Returns what runs a layer like layer i: (x, (weights, window)) -> (x, terms of loss)."""
        kind = dataclasses.replace(self._config.layers[i], window=None)
        block = Block(self._config, self._mesh, kind, parent=None)
        order = jnp.asarray(Zigzag(self._mesh.shape["context"], length).permutation(length))
        at = self._placed(jnp.broadcast_to(order, inputs.begin.shape))
        shardings = self._shardings[f"layers_{i}"]

        def feed_forward(weights: dict, x: jax.Array) -> jax.Array:
            return block.apply({"params": weights}, x, method="feed_forward")

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x: jax.Array, of_layer: tuple[dict, jax.Array]) -> tuple[jax.Array, tuple]:
            weights, window = of_layer
            weights = jax.tree.map(_whole, shardings, weights)
            begin = jnp.maximum(inputs.begin, at + 1 - window)
            row = x, inputs.replace(begin=begin), None
            x, _ = block.apply({"params": weights}, *row, method="attend")
            x = self._placed(x)
            mlp = {name: w for name, w in weights.items() if "mlp" in name}
            has_loss = own_loss(kind.mlp) is not None
            terms = block.apply({"params": mlp}, x, method="loss_terms") if has_loss else ()
            x = in_chunks(feed_forward, self._mesh, self._chunks.mlp, mlp, x)
            return self._placed(x), terms

        return layer

    def _placed(self, x: jax.Array) -> jax.Array:
        """Shards [rows, length, ...] over the data and context axes."""
        return jax.lax.with_sharding_constraint(x, sharding(self._mesh, CHUNK_SPEC))


def _stacked(placed: NamedSharding, weights: tuple[jax.Array, ...]) -> jax.Array:
    where = NamedSharding(placed.mesh, PartitionSpec(None, *placed.spec))
    return jax.lax.with_sharding_constraint(jnp.stack(weights), where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(placed: NamedSharding, weight: jax.Array) -> jax.Array:
    """Gathers a weight along the context axis; its gradient is sharded as `placed` says."""
    where = NamedSharding(placed.mesh, drop_axis(placed.spec, "context"))
    return jax.lax.with_sharding_constraint(weight, where)


_whole.defvjp(
    lambda placed, weight: (_whole(placed, weight), None),
    lambda placed, _, d_weight: (jax.lax.with_sharding_constraint(d_weight, placed),),
)
