"""Deployments: layouts of a model on devices that need not be present."""

import dataclasses

from lsjax.cache import CacheSpec
from lsjax.inference.engine_config import EngineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment(EngineConfig):
    """Layout of a model on devices: all that decides the memory per device but the prompt length.

    The mesh has a shape but no devices.

    Attributes:
      batch: number of prompts answered together.
      document_length: tokens of a document that all prompts begin with, which is kept once; a
        prompt's length is then that of its question. 0 for none.
      output_length: number of tokens to generate.
    """

    batch: int
    output_length: int
    document_length: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Number of devices by axis name: data, context, model."""
        return dict(self.mesh.shape)

    def cache_spec_for(self, input_length: int) -> CacheSpec:
        """Returns the spec of the cache that run_pa makes for prompts of this many tokens."""
        return self.cache_spec(self.batch, input_length, self.output_length)

    @property
    def mesh_text(self) -> str:
        """The mesh in the form that the flag --mesh takes."""
        return ",".join(f"{a}={n}" for a, n in self.sizes.items() if n > 1) or "context=1"

    @property
    def weight_flag(self) -> str:
        """The flag --weight_dtype with a space after it; "" for weights in `dtype`."""
        return "" if self.weight_dtype == "auto" else f"--weight_dtype {self.weight_dtype} "


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
