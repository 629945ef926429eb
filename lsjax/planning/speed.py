"""How long a run will take, from what devices can do at best and the shares of it assumed here.

No time in it was measured on the devices that are planned for.
"""

import dataclasses
import functools
import time

import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.planning.arithmetic import cache_bytes, weight_bytes
from lsjax.planning.layout import Layout
from lsjax.planning.targets import Rates, Target
from lsjax.requests import round_up

# Shares of the best that programs are taken to reach.
_OF_FLOPS, _OF_BANDWIDTH, _OF_LINK = 0.5, 0.7, 0.7
# Seconds that devices take to come together once.
_MEETING = 10e-6
ASSUMED = (
    f"assuming {_OF_FLOPS:.0%} of the rate of matrix products, {_OF_BANDWIDTH:.0%} of the memory's "
    f"bandwidth and {_OF_LINK:.0%} of the links'"
)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of a full batch, expected and not measured.

    Attributes:
      prefill_seconds: of prompts of the planned length.
      decode_tokens_per_second: after them, over all rows.
    """

    prefill_seconds: float
    decode_tokens_per_second: float


def expected_speed(
    config: ModelConfig, target: Target, layout: Layout, input_length: int
) -> Speed | None:
    """What a target is expected to do; None for an accelerator whose rates are not known."""
    rates = measured_rates(target.devices) if target.platform == "cpu" else target.rates
    if rates is None:
        return None
    _, context, model = layout.mesh
    devices = layout.sizes["data"] * context * model
    itemsize = jnp.dtype(layout.dtype).itemsize
    layer, rest = weight_bytes(config, layout.mesh, layout.dtype)
    whole_layers = config.num_layers * layer * context  # of a model part
    chunks = -(-input_length // layout.prefill_chunk)
    tokens = round_up(input_length, layout.prefill_chunk) * layout.batch

    products = 2 * tokens * whole_layers * model / itemsize
    attention = 4 * config.num_heads * config.head_dim * layout.batch * _pairs(config, input_length)
    computing = (products + attention) / (devices * rates.flops * _OF_FLOPS)
    of_each = tokens / (devices / model) * config.hidden_size * itemsize
    summed = 4 * config.num_layers * of_each * (model - 1) / model
    gathered = chunks * whole_layers * (context - 1) / context
    sending = (summed + gathered) / (rates.link * _OF_LINK)

    # The embedding is looked up, not read.
    read = config.num_layers * layer + (rest if config.tie_embeddings else rest / 2)
    read += cache_bytes(config, target.platform, layout, input_length)
    meetings = (2 if model > 1 else 0) + (8 if context > 1 else 0)
    step = read / (rates.bandwidth * _OF_BANDWIDTH) + config.num_layers * meetings * _MEETING
    return Speed(computing + sending, layout.batch / step)


def _pairs(config: ModelConfig, length: int) -> float:
    """Of a query and a key that it sees, over all layers."""
    seen = 0.0
    for window in config.windows:
        within = min(length, window or length)
        seen += length * within - within**2 / 2
    return seen


@functools.cache
def measured_rates(devices: int) -> Rates:
    """Of each of some CPU devices that share this machine, measured in a fraction of a second."""
    x = np.ones((1536, 1536), np.float32)
    flops = 2 * len(x) ** 3 / _seconds(lambda: x @ x)
    source, copy = np.ones((2, 2**24), np.float32)
    bandwidth = 2 * source.nbytes / _seconds(lambda: np.copyto(copy, source))
    return Rates(flops / devices, bandwidth / devices, bandwidth / devices)


def _seconds(work) -> float:
    """The shorter of two times, after one that nobody counts."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])
