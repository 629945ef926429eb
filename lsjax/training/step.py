"""One training step on a mesh: gradients of the loss, and the optimizer's update.

Weights are float32 and sharded as parameter_spec says, with their rows split over the context
axis. The optimizer's state is sharded like the weights. The dtype of the computation is a choice.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax.config import ModelConfig
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import CHUNK_SPEC, TOKENS_SPEC, put_on_mesh, sharding
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.positions.rotary import RotaryTables, rotary_tables
from lsjax.runtime.compilation import compiler_options
from lsjax.runtime.errors import UserError
from lsjax.training.batch import Batch, length_unit
from lsjax.training.loss import ChunkSizes, Loss


@flax.struct.dataclass
class TrainState:
    """What one step passes to the next.

    Attributes:
      step: [] int32 number of steps done.
      params: the model's parameters, float32.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: dict
    opt_state: Any


@flax.struct.dataclass
class Metrics:
    """Metrics of one step.

    Attributes:
      loss: [] float32 weighted mean loss of the targets, in nats, plus that of the MLPs.
      grad_norm: [] float32 global norm of the gradients, before the optimizer clips them.
      tokens: [] int32 number of targets with a weight above 0.
    """

    loss: jax.Array
    grad_norm: jax.Array
    tokens: jax.Array


class Trainer:
    """Runs a model's training step on a mesh; each new shape is compiled once.

    Attributes:
      config: the model.
      mesh: the devices. Rows of a batch are sharded over `data`, the tokens of a row over
        `context` (in zigzag order, the row being one block), and heads, MLP channels and
        vocabulary over `model`.
      dtype: dtype of the computation, bfloat16 or float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        optimizer: optax.GradientTransformation,
        dtype: str = "bfloat16",
        chunks: ChunkSizes = ChunkSizes(),  # noqa: B008 (frozen)
    ):
        self.config, self.mesh, self.dtype = config, mesh, dtype
        self._optimizer = optimizer
        self._loss = Loss(config, mesh, dtype, chunks)
        self._whole = sharding(mesh, PartitionSpec())
        shapes = self.shapes()
        where = jax.tree.map(lambda x: x.sharding, shapes)
        options = compiler_options(mesh.devices.flat[0].platform)
        self._start = jax.jit(optimizer.init, out_shardings=where.opt_state)
        self._step = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=(where, self._whole),
            compiler_options=options,
        )
        self._losses = jax.jit(
            self._losses_in_order,
            out_shardings=sharding(mesh, TOKENS_SPEC),
            compiler_options=options,
        )

    def init(self, params: dict) -> TrainState:
        """Returns the state to start from.

        Args:
          params: float32 parameters, on the mesh as `shapes` says. The first step donates them.
        """
        step = jnp.zeros((), jnp.int32, device=self._whole)
        return TrainState(step=step, params=params, opt_state=self._start(params))

    def shapes(self) -> TrainState:
        """Returns shapes, dtypes and shardings of a state, for restoring a checkpoint."""
        params = unflatten(abstract_parameters(self.config, self.mesh, "float32"))

        def whole(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole)

        opt_state = optax.tree.map_params(
            self._optimizer,
            lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
            jax.eval_shape(self._optimizer.init, params),
            params,
            transform_non_params=whole,
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._whole)
        return TrainState(step=step, params=params, opt_state=opt_state)

    def tables(self, length: int) -> RotaryTables:
        """Returns RoPE tables for documents of up to `length` tokens, replicated on the mesh."""
        tables = rotary_tables(self.config, [length])
        return jax.tree.map(lambda x: put_on_mesh(np.asarray(x), self._whole), tables)

    def step(
        self, state: TrainState, batch: Batch, tables: RotaryTables
    ) -> tuple[TrainState, Metrics]:
        """Runs one step.

        Args:
          state: the state before the step; it is donated.
          batch: NumPy arrays [parts, rows, length]; every process passes the whole batch. Parts
            run one at a time, and their gradients are summed.
          tables: RoPE tables for the documents.

        Raises:
          UserError: the mesh does not divide rows or length.
        """
        return self._step(state, self._placed(batch, _PARTS), tables)

    def losses(self, params: dict, batch: Batch, tables: RotaryTables) -> jax.Array:
        """Returns the unweighted losses in nats, [rows, length] float32 in the order of the batch.

        Args:
          params: float32 parameters, on the mesh.
          batch: NumPy arrays [rows, length].
          tables: RoPE tables for the documents.

        Raises:
          UserError: the mesh does not divide rows or length.
        """
        return self._losses(params, self._placed(batch, CHUNK_SPEC), tables)

    def lower(self, rows: int, length: int, parts: int = 1) -> jax.stages.Lowered:
        """Lowers the step, to be compiled for a mesh whose devices may not be present."""
        self._check(rows, length)
        where = sharding(self.mesh, _PARTS)

        def of(dtype: str) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((parts, rows, length), dtype, sharding=where)

        batch = Batch(of("int32"), of("int32"), of("int32"), of("int32"), of("float32"))
        tables = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole),
            jax.eval_shape(lambda: rotary_tables(self.config, [length])),
        )
        return self._step.lower(self.shapes(), batch, tables)

    def _check(self, rows: int, length: int) -> None:
        data, context = self.mesh.shape["data"], self.mesh.shape["context"]
        if rows % data:
            raise UserError(
                f"{rows} rows cannot be split over data={data}; give a multiple of {data}."
            )
        unit = length_unit(length, context)
        if length % unit:
            raise UserError(
                f"rows of {length:,} tokens cannot be split over context={context}; give a "
                f"multiple of {unit}."
            )

    def _placed(self, batch: Batch, spec: PartitionSpec) -> Batch:
        rows, length = batch.tokens.shape[-2:]
        self._check(rows, length)
        order = Zigzag(self.mesh.shape["context"], length).permutation(length)
        where: NamedSharding = sharding(self.mesh, spec)
        return jax.tree.map(lambda x: put_on_mesh(x[..., order], where), batch)

    def _train_step(self, state: TrainState, batch: Batch, tables: RotaryTables):
        total = jnp.sum(batch.weights)
        total = jnp.where(total > 0, total, 1.0)

        def loss_of(params: dict, part: Batch) -> jax.Array:
            losses, of_mlps = self._loss(params, part, tables)
            return jnp.sum(losses * part.weights) / total + of_mlps / batch.tokens.shape[0]

        def add(sums, part: Batch):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_of)(state.params, part)), ()

        if batch.tokens.shape[0] == 1:
            only = jax.tree.map(lambda x: x[0], batch)
            loss, grads = jax.value_and_grad(loss_of)(state.params, only)
        else:
            zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
            (loss, grads), _ = jax.lax.scan(add, zeros, batch)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        metrics = Metrics(
            loss=loss,
            grad_norm=optax.tree.norm(grads),
            tokens=jnp.sum(batch.weights > 0, dtype=jnp.int32),
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def _losses_in_order(self, params: dict, batch: Batch, tables: RotaryTables) -> jax.Array:
        length = batch.tokens.shape[1]
        order = Zigzag(self.mesh.shape["context"], length).permutation(length)
        return self._loss(params, batch, tables)[0][:, np.argsort(order)]


_PARTS = PartitionSpec(None, *CHUNK_SPEC)
