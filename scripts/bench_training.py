"""A training step on long rows: its time, and what it takes of a device's memory.

    python scripts/bench_training.py --length 8192 --against_plain
    python scripts/bench_training.py --mesh context=8 --length 131072 --layers 1
    python scripts/bench_training.py --config config.json --target v5p:2x2x2 --mesh context=8 \
        --length 1048576 --dtype bfloat16

The first measures it against a plain step: all scores of attention at once, all logits, and all
that a layer makes kept for its gradients. They are run in turn, and medians compared. The last
asks the target's compiler alone, which need not be here (pip install 'lsjax[ahead]').

On a CPU the devices share its cores: the time shows what dealing out costs, not what it gains.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lsjax import cli
from lsjax.compilation import compiler_options
from lsjax.config import ModelConfig
from lsjax.errors import UserError
from lsjax.families import parse_config, read_config
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import random_parameters
from lsjax.planning import find_target, target_mesh
from lsjax.precision import einsum
from lsjax.report import human_bytes
from lsjax.settings import COMPUTE_DTYPES
from lsjax.sharding import check_fits_mesh, make_mesh, parse_mesh
from lsjax.shipped.model import HF_CONFIGS
from lsjax.training.batch import Batch

FLAGS = flags.FLAGS

flags.DEFINE_string("config", None, "A config.json; the shipped model's if not given.")
flags.DEFINE_integer("layers", None, "Of the model; its own if not given.", lower_bound=1)
flags.DEFINE_string("mesh", "", "Devices by axis (data, context, model): context=4,model=2.")
flags.DEFINE_integer("length", 8192, "Tokens of a row.", lower_bound=2)
flags.DEFINE_enum("dtype", "float32", COMPUTE_DTYPES, "That is computed in.")
flags.DEFINE_integer("rounds", 3, "Steps that are timed.", lower_bound=1)
flags.DEFINE_bool("against_plain", False, "Measure a plain step as well; on one device.")
flags.DEFINE_string("target", None, "Only compile, for devices as scripts/plan.py takes them.")

# Takes one step, from the state that the one before left.
Step = Callable[[], None]


def main(_) -> None:
    sizes = parse_mesh(FLAGS.mesh)
    config = read_config(FLAGS.config) if FLAGS.config else parse_config(HF_CONFIGS["rotary"])
    if FLAGS.layers:
        windows = (config.windows * FLAGS.layers)[: FLAGS.layers]
        config = dataclasses.replace(config, num_layers=FLAGS.layers, windows=windows)
    check_fits_mesh(config, sizes)
    devices = int(np.prod(list(sizes.values())))
    if FLAGS.target:
        _ahead(config, sizes)
        return
    if FLAGS.against_plain and devices > 1:
        raise UserError("--against_plain goes with one device; leave --mesh out.")
    cli.make_cpu_devices(devices)
    print("step          seconds   tokens/s  temporaries a device")
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
    speed = rows * FLAGS.length / seconds
    print(f"{name:10}{seconds:11.2f}{speed:11,.0f}{human_bytes(temporaries):>22}", flush=True)


def _medians(*steps: Step) -> list[float]:
    """Seconds of each, run in turn; a first step of each is not timed."""
    seconds = [[] for _ in steps]
    for round in range(FLAGS.rounds + 1):
        for step, taken in zip(steps, seconds, strict=True):
            began = time.perf_counter()
            step()
            if round:
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def _batch(config: ModelConfig, rows: int) -> Batch:
    """[1, rows, length], each row one document."""
    shape = (1, rows, FLAGS.length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(FLAGS.length, dtype=np.int32), shape)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=-1),
        positions=positions,
        begin=np.zeros(shape, np.int32),
        weights=np.ones(shape, np.float32),
    )


def _trainer(config: ModelConfig, mesh: jax.sharding.Mesh):
    import optax  # after the flags: it is an extra

    from lsjax.training.step import Trainer

    return Trainer(config, mesh, optax.adamw(1e-5), FLAGS.dtype)


def _ours(config: ModelConfig, sizes: dict[str, int]) -> tuple[Step, int]:
    """The step, and bytes of temporaries on each device."""
    mesh = make_mesh(sizes)
    trainer, rows = _trainer(config, mesh), sizes["data"]
    state = trainer.init(random_parameters(config, mesh, "float32"))
    batch, tables = _batch(config, rows), trainer.tables(FLAGS.length)
    program = trainer.lower(rows, FLAGS.length).compile()

    def step() -> None:
        nonlocal state
        state, metrics = trainer.step(state, batch, tables)
        jax.block_until_ready(metrics)

    return step, program.memory_analysis().temp_size_in_bytes


def _plain(config: ModelConfig) -> tuple[Step, int]:
    """As `_ours`, of a step that is written down as one would for short rows."""
    import optax

    mesh, optimiser = make_mesh(""), optax.adamw(1e-5)
    decoder = Decoder(config, mesh, jnp.dtype(FLAGS.dtype))

    def loss_of(params: dict, batch: Batch, tables) -> jax.Array:
        params = {"params": jax.tree.map(lambda x: x.astype(FLAGS.dtype), params)}
        with mock.patch("lsjax.nn.attention.self_attention", _full_attention):
            hidden, _ = decoder.apply(params, batch.tokens, batch.positions, tables, None)
        logits = decoder.apply(params, hidden, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.mean(losses)

    def train_step(params: dict, opt_state, batch: Batch, tables):
        grads = jax.grad(loss_of)(params, batch, tables)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = random_parameters(config, mesh, "float32")
    state = params, optimiser.init(params)
    batch = jax.device_put(jax.tree.map(lambda x: x[0], _batch(config, 1)))
    tables = _trainer(config, mesh).tables(FLAGS.length)
    options = compiler_options(mesh.devices.flat[0].platform)
    jitted = jax.jit(train_step, donate_argnums=(0, 1), compiler_options=options)
    program = jitted.lower(*state, batch, tables).compile()

    def step() -> None:
        nonlocal state
        state = program(*state, batch, tables)
        jax.block_until_ready(state)

    return step, program.memory_analysis().temp_size_in_bytes


def _full_attention(mesh, q, k, v, begin, window, slopes) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v with all scores at once; see self_attention."""
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
    jax.config.update("jax_platforms", "cpu")  # the devices that are here are not asked
    target = find_target(FLAGS.target)
    trainer = _trainer(config, target_mesh(target, sizes))
    try:
        memory = trainer.lower(sizes["data"], FLAGS.length).compile().memory_analysis()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).partition("\n")[0]
        raise UserError(f"{target.name} does not take it: {said}") from None
    state, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = state + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(
        f"{config.architecture} of {config.num_layers} layers, {sizes['data']} x "
        f"{FLAGS.length:,} tokens on {target.name}, a device: state and batch "
        f"{human_bytes(state)}, temporaries {human_bytes(temporaries)}, together "
        f"{human_bytes(total)} of {human_bytes(target.memory)}: "
        f"{'fits' if total <= target.memory else 'DOES NOT FIT'}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
