"""Measures a training step on long sequences: its time, and its memory per device.

    python scripts/bench_training.py --seq_length 8192 --against_plain
    python scripts/bench_training.py --mesh context=8 --seq_length 131072 --layers 1
    python scripts/bench_training.py --config config.json --target v5p:2x2x2 --mesh context=8 \
        --seq_length 1048576 --dtype bfloat16

The first command compares the step of lsjax with a plain one, which computes all attention scores
and all logits at once and keeps every activation of a layer for the gradients. Both run in turn,
and medians are compared. The last command only runs the target's compiler; the target need not be
present (pip install 'lsjax[ahead]').

On a CPU the devices share its cores: the time shows what splitting the sequence costs, not what it
gains.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lsjax.cli.program import make_cpu_devices, run_program
from lsjax.config import ModelConfig
from lsjax.distributed.sharding import check_fits_mesh, make_mesh, parse_mesh
from lsjax.families import parse_config, read_config
from lsjax.inference.options import COMPUTE_DTYPES
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import random_parameters
from lsjax.planning import find_target, target_mesh
from lsjax.runtime.compilation import compiler_options
from lsjax.runtime.errors import UserError
from lsjax.runtime.memory import human_bytes
from lsjax.runtime.precision import einsum
from lsjax.shipped.model import HF_CONFIGS
from lsjax.training.batch import Batch

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "config", None, "config.json of the model to measure. Default: the shipped model's."
)
flags.DEFINE_integer(
    "layers", None, "Number of layers. Default: as many as the model has.", lower_bound=1
)
flags.DEFINE_string(
    "mesh",
    "",
    "Devices per mesh axis (data, context, model), such as context=4,model=2. Default: one device.",
)
flags.DEFINE_integer("seq_length", 8192, "Tokens per training sequence.", lower_bound=2)
flags.DEFINE_enum("dtype", "float32", COMPUTE_DTYPES, "Dtype of the computation.")
flags.DEFINE_integer("repeats", 3, "Number of timed steps; the median is reported.", lower_bound=1)
flags.DEFINE_bool("against_plain", False, "Measure a plain step as well; needs one device.")
flags.DEFINE_string(
    "target",
    None,
    "Devices to compile the step for without running it, such as v5p:2x2x2 or h100-80gb:8.",
)

# Runs one training step from the state that the last call left.
Step = Callable[[], None]


def main(_) -> None:
    sizes = parse_mesh(FLAGS.mesh)
    config = read_config(FLAGS.config) if FLAGS.config else parse_config(HF_CONFIGS["rotary"])
    if FLAGS.layers:
        layers = (config.layers * FLAGS.layers)[: FLAGS.layers]
        config = dataclasses.replace(config, layers=layers)
    check_fits_mesh(config, sizes)
    devices = int(np.prod(list(sizes.values())))
    if FLAGS.target:
        _ahead(config, sizes)
        return
    if FLAGS.against_plain and devices > 1:
        raise UserError("--against_plain goes with one device; leave --mesh out.")
    make_cpu_devices(devices)
    print("step          seconds   tokens/s  temporaries per device")
    ours, temporaries = _ours(config, sizes)
    if not FLAGS.against_plain:
        (seconds,) = _medians(ours)
        _print("ours", seconds, temporaries, sizes["data"])
        return
    plain, plain_temporaries = _plain(config)
    seconds, plain_seconds = _medians(ours, plain)
    _print("ours", seconds, temporaries, 1)
    _print("plain", plain_seconds, plain_temporaries, 1)
    print(
        f"ours / plain: time {seconds / plain_seconds:.3f}, temporaries "
        f"{temporaries / plain_temporaries:.3f}"
    )


def _print(name: str, seconds: float, temporaries: int, rows: int) -> None:
    speed = rows * FLAGS.seq_length / seconds
    print(f"{name:10}{seconds:11.2f}{speed:11,.0f}{human_bytes(temporaries):>22}", flush=True)


def _medians(*steps: Step) -> list[float]:
    """Returns the median seconds of each step; they run in turn, after one warm-up each."""
    seconds = [[] for _ in steps]
    for round in range(FLAGS.repeats + 1):
        for step, taken in zip(steps, seconds, strict=True):
            began = time.perf_counter()
            step()
            if round:
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def _batch(config: ModelConfig, rows: int) -> Batch:
    """Returns a batch [1, rows, length] whose rows are one document each."""
    shape = (1, rows, FLAGS.seq_length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(FLAGS.seq_length, dtype=np.int32), shape)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=-1),
        positions=positions,
        begin=np.zeros(shape, np.int32),
        weights=np.ones(shape, np.float32),
    )


def _trainer(config: ModelConfig, mesh: jax.sharding.Mesh):
    import optax  # only here, since it is an optional extra

    from lsjax.training.step import Trainer

    return Trainer(config, mesh, optax.adamw(1e-5), FLAGS.dtype)


def _ours(config: ModelConfig, sizes: dict[str, int]) -> tuple[Step, int]:
    """Returns the lsjax step, and its bytes of temporaries per device."""
    mesh = make_mesh(sizes)
    trainer, rows = _trainer(config, mesh), sizes["data"]
    state = trainer.init(random_parameters(config, mesh, "float32"))
    batch, tables = _batch(config, rows), trainer.tables(FLAGS.seq_length)
    program = trainer.lower(rows, FLAGS.seq_length).compile()

    def step() -> None:
        nonlocal state
        state, metrics = trainer.step(state, batch, tables)
        jax.block_until_ready(metrics)

    return step, program.memory_analysis().temp_size_in_bytes


def _plain(config: ModelConfig) -> tuple[Step, int]:
    """Returns a step written as one would for short rows, and its bytes of temporaries."""
    import optax

    mesh, optimizer = make_mesh(""), optax.adamw(1e-5)
    decoder = Decoder(config, mesh, jnp.dtype(FLAGS.dtype), self_attention=_full_attention)

    def loss_of(params: dict, batch: Batch, tables) -> jax.Array:
        params = {"params": jax.tree.map(lambda x: x.astype(FLAGS.dtype), params)}
        hidden, _ = decoder.apply(params, batch.tokens, batch.positions, tables, None)
        logits = decoder.apply(params, hidden, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.mean(losses)

    def train_step(params: dict, opt_state, batch: Batch, tables):
        grads = jax.grad(loss_of)(params, batch, tables)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = random_parameters(config, mesh, "float32")
    state = params, optimizer.init(params)
    batch = jax.device_put(jax.tree.map(lambda x: x[0], _batch(config, 1)))
    tables = _trainer(config, mesh).tables(FLAGS.seq_length)
    options = compiler_options(mesh.devices.flat[0].platform)
    jitted = jax.jit(train_step, donate_argnums=(0, 1), compiler_options=options)
    program = jitted.lower(*state, batch, tables).compile()

    def step() -> None:
        nonlocal state
        state = program(*state, batch, tables)
        jax.block_until_ready(state)

    return step, program.memory_analysis().temp_size_in_bytes


def _full_attention(mesh, q, k, v, begin, window, slopes) -> jax.Array:
    """Computes softmax(q k^T / sqrt(head_dim)) v, all scores at once; see self_attention."""
    batch, length, _, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = einsum("bqkgd,bskd->bkgqs", grouped, k) * head_dim**-0.5
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    if slopes is not None:
        scores -= slopes.reshape(*scores.shape[1:3], 1, 1) * distance
    visible = (distance >= 0) & (distance < (window or length))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return einsum("bkgqs,bskd->bqkgd", weights, v).reshape(q.shape).astype(q.dtype)


def _ahead(config: ModelConfig, sizes: dict[str, int]) -> None:
    jax.config.update("jax_platforms", "cpu")  # leaves local accelerators untouched
    target = find_target(FLAGS.target)
    trainer = _trainer(config, target_mesh(target, sizes))
    try:
        memory = trainer.lower(sizes["data"], FLAGS.seq_length).compile().memory_analysis()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).partition("\n")[0]
        raise UserError(f"{target.name} does not take it: {said}") from None
    state, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = state + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(
        f"{config.architecture} of {config.num_layers} layers, {sizes['data']} x "
        f"{FLAGS.seq_length:,} tokens on {target.name}, per device: state and batch "
        f"{human_bytes(state)}, temporaries {human_bytes(temporaries)}, together "
        f"{human_bytes(total)} of {human_bytes(target.memory)}: "
        f"{'fits' if total <= target.memory else 'DOES NOT FIT'}"
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
