"""Bytes a device, as the compiler says them of the very programs that would run."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from lsjax.cache import CacheSpec
from lsjax.config import ModelConfig
from lsjax.engine import Engine


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a program takes of each device, in bytes.

    Attributes:
      weights: the parameters, and the little else that is there throughout.
      cache: keys and values.
      temporaries: everything else, while it runs.
    """

    weights: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries


def compile_for(
    config: ModelConfig, mesh: Mesh, dtype: str, spec: CacheSpec, chunk: int
) -> dict[str, Needs]:
    """Compiles prefill and decode for a mesh.

    Args:
      config: the model.
      mesh: of devices that need not be here.
      dtype: of weights and activations.
      spec: of the cache.
      chunk: tokens of prompt run at once.

    Returns:
      The needs of "prefill" and of "decode".
    """
    prefill, decode = (
        p.memory_analysis()
        for p in Engine(config, mesh, dtype, spec.dtype, chunk).compile_ahead(spec)
    )
    # Decode takes all weights; prefill leaves the head alone, but it lies there. The cache is what
    # comes out where it went in.
    weights = decode.argument_size_in_bytes - decode.alias_size_in_bytes

    def needs(program: Any) -> Needs:
        cache = program.alias_size_in_bytes
        out = program.output_size_in_bytes - cache
        return Needs(weights, cache, program.temp_size_in_bytes + out)

    return {"prefill": needs(prefill), "decode": needs(decode)}
