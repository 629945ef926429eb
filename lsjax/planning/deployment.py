"""Deployments: layouts of a model on devices that need not be present."""

import dataclasses

from jax.sharding import AbstractMesh

from lsjax.cache import CacheSpec
from lsjax.compression import Compression
from lsjax.distributed.sharding import AXES, abstract_mesh
from lsjax.inference.request import cache_spec


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Layout of a model on devices: all that decides the memory per device but the prompt length.

    Attributes:
      mesh: devices along the data, context and model axes.
      dtype: dtype of weights and activations.
      kv_cache_dtype: dtype of the KV cache, one of CACHE_DTYPES.
      prefill_chunk: prompt tokens per prefill step; a whole number of zigzag blocks, see Zigzag.
      batch: number of prompts answered together.
      output_length: number of tokens to generate.
      compression: KV head compression, or None.
    """

    mesh: tuple[int, int, int]
    dtype: str
    kv_cache_dtype: str
    prefill_chunk: int
    batch: int
    output_length: int
    compression: Compression | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Number of devices by axis name."""
        return dict(zip(AXES, self.mesh, strict=True))

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """Mesh that has a shape but no devices."""
        return abstract_mesh(self.mesh)

    def cache_spec(self, input_length: int) -> CacheSpec:
        """Returns the spec of the cache that run_pa makes for prompts of this many tokens."""
        return cache_spec(
            self.abstract_mesh,
            self.batch,
            input_length,
            self.output_length,
            self.prefill_chunk,
            self.kv_cache_dtype,
            self.dtype,
        )

    @property
    def mesh_text(self) -> str:
        """The mesh in the form that the flag --mesh takes."""
        return ",".join(f"{a}={n}" for a, n in self.sizes.items() if n > 1) or "context=1"


@dataclasses.dataclass(frozen=True)
class MemoryUsage:
    """Memory that a program needs, in bytes per device.

    Attributes:
      weights: bytes of the parameters, and of the small arrays that are always held.
      cache: bytes of the KV cache.
      temporaries: bytes of everything else while the program runs.
    """

    weights: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries
