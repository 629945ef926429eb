"""How a model is to be laid out on devices, without any."""

import dataclasses

from jax.sharding import AbstractMesh

from lsjax.cache import CacheSpec
from lsjax.compression import Compression
from lsjax.requests import cache_spec
from lsjax.sharding import AXES, abstract_mesh


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything but the length of the input that decides what a device must hold.

    Attributes:
      mesh: devices along data, context and model.
      dtype: of weights and activations.
      kv_cache_dtype: one of CACHE_DTYPES.
      prefill_chunk: tokens of prompt run at once; whole stripes, see Zigzag.
      batch: prompts answered together.
      output_length: tokens to generate.
      compression: of the KV heads, or None.
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
        """Devices by axis."""
        return dict(zip(AXES, self.mesh, strict=True))

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """A mesh that has a shape but no devices."""
        return abstract_mesh(self.mesh)

    def cache_spec(self, input_length: int) -> CacheSpec:
        """The cache that prompts of this many tokens need, as run_pa makes it."""
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
        """As --mesh takes it."""
        return ",".join(f"{a}={n}" for a, n in self.sizes.items() if n > 1) or "context=1"
