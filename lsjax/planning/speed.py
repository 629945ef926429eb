"""Expected speed: the devices' peak rates, times the shares of them that are assumed here.

No time was measured on the devices that are planned for.
"""

import dataclasses
import functools
import time

import jax.numpy as jnp
import numpy as np

from lsjax.attention.sparse.rule import TILE
from lsjax.config import ModelConfig
from lsjax.inference.engine_config import round_up
from lsjax.inference.sparse_prefill import why_not_sparse
from lsjax.planning.arithmetic import active_weight_bytes, cache_bytes, weight_bytes
from lsjax.planning.deployment import Deployment
from lsjax.planning.targets import Target
from lsjax.runtime.devices import Rates

# Shares of the peak rates that programs are assumed to reach.
_OF_FLOPS, _OF_BANDWIDTH, _OF_LINK = 0.5, 0.7, 0.7
# Share of full attention that sparse prefill is assumed to attend to; its choice comes on top.
DENSITY = 0.05
# Latency of one collective, in seconds.
_MEETING = 10e-6
ASSUMED = (
    f"assuming {_OF_FLOPS:.0%} of the rate of matrix products, {_OF_BANDWIDTH:.0%} of the memory's "
    f"bandwidth and {_OF_LINK:.0%} of the links'"
)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed of a full batch, expected and not measured.

    Attributes:
      prefill_seconds: seconds to prefill prompts of the planned length, and to read a document.
      sparse_prefill_seconds: the same with sparse prefill that attends to DENSITY; around a ring
        all keys are sent in any case. None where sparse prefill is refused.
      decode_tokens_per_second: decode rate after such prompts, summed over all rows.
    """

    prefill_seconds: float
    sparse_prefill_seconds: float | None
    decode_tokens_per_second: float


def expected_speed(
    config: ModelConfig, target: Target, deployment: Deployment, input_length: int
) -> Speed | None:
    """Returns the speed expected on a target, or None if its rates are unknown.

    Args:
      config: model configuration.
      target: devices to plan for; the rates of a CPU are measured on this machine.
      deployment: layout of the model on the devices.
      input_length: prompt length in tokens, without the document.
    """
    rates = measured_rates(target.devices) if target.platform == "cpu" else target.rates
    if rates is None:
        return None
    data, context, model = deployment.sizes.values()
    devices = data * context * model
    itemsize = jnp.dtype(deployment.dtype).itemsize
    per_token, _ = active_weight_bytes(config, deployment.mesh, deployment.dtype, "auto", 1)
    numbers = sum(per_token) * context * model / itemsize
    formats = deployment.mesh, deployment.dtype, deployment.weight_dtype
    layers, rest = weight_bytes(config, *formats)
    whole_layers = sum(layers) * context  # bytes per shard of the model axis
    document = deployment.document_length
    chunks = sum(-(-n // deployment.prefill_chunk) for n in (document, input_length))
    tokens = round_up(input_length, deployment.prefill_chunk) * deployment.batch + document * data

    products = 2 * tokens * numbers
    total = document + input_length
    pairs = deployment.batch * _pairs(config, total, deployment.span(total))
    pairs -= (deployment.batch - data) * _pairs(config, document, deployment.span(document))
    attention = 4 * config.num_heads * config.head_dim * pairs
    products += tokens * sum(k.recurrence.operations for k in config.layers if k.recurrence)
    rate = devices * rates.flops * _OF_FLOPS
    of_each = tokens / (devices / model) * config.hidden_size * itemsize
    summed = 4 * config.num_layers * of_each * (model - 1) / model
    gathered = chunks * whole_layers * (context - 1) / context
    sending = (summed + gathered) / (rates.link * _OF_LINK)

    # A separate embedding table, half of `rest`, is only looked up and not read as a whole.
    active, _ = active_weight_bytes(config, *formats, deployment.batch // data)
    read = sum(active) + (rest if config.tie_embeddings else rest / 2)
    cache = cache_bytes(config, target.platform, deployment, input_length)
    read += cache
    meetings = (2 if model > 1 else 0) + (8 if context > 1 else 0)
    step = read / (rates.bandwidth * _OF_BANDWIDTH) + config.num_layers * meetings * _MEETING
    # Each chunk sends what is there of the cache once around: half of the whole, on average.
    ring = chunks * cache / 2 * (context - 1) / (rates.link * _OF_LINK)
    chosen = min(max(attention * (DENSITY + 1 / TILE) / rate, ring), attention / rate)
    refused = why_not_sparse(config, target.platform, deployment) is not None
    return Speed(
        prefill_seconds=(products + attention) / rate + sending,
        sparse_prefill_seconds=None if refused else products / rate + chosen + sending,
        decode_tokens_per_second=deployment.batch / step,
    )


def _pairs(config: ModelConfig, length: int, span: int) -> float:
    """Returns the number of pairs of a query and a key that it attends to, over all layers.

    A query attends to at most `span` keys.
    """
    seen = 0.0
    for kind in config.layers:
        if not kind.recurrence:
            within = min(span, kind.window or length)
            seen += length * within - within**2 / 2
    return seen


@functools.cache
def measured_rates(devices: int) -> Rates:
    """Measures, in a fraction of a second, the rates per device of CPU devices of this machine."""
    x = np.ones((1536, 1536), np.float32)
    flops = 2 * len(x) ** 3 / _seconds(lambda: x @ x)
    source, copy = np.ones((2, 2**24), np.float32)
    bandwidth = 2 * source.nbytes / _seconds(lambda: np.copyto(copy, source))
    return Rates(flops / devices, bandwidth / devices, bandwidth / devices)


def _seconds(work) -> float:
    """Returns the minimum of two timed runs after one warm-up."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])
