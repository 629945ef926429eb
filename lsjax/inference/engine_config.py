"""How a model runs on its devices: the settings that an engine, a plan and the flags share."""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from lsjax.attention.sparse.rule import SparsePrefill
from lsjax.cache import BLOCK, CacheSpec
from lsjax.compression import Compression
from lsjax.config import ModelConfig
from lsjax.distributed.sequence_layout import CAPACITY_MULTIPLE, Zigzag, zigzag_of
from lsjax.positions.dual_chunk import chunks_for
from lsjax.runtime.errors import UserError

SEGMENT = 16  # decode steps between two checks for end-of-sequence
# A long cache's capacity per device of the context axis is a multiple of this, so that attention
# can read it in large blocks.
_LARGE_CAPACITY_MULTIPLE = 16 * CAPACITY_MULTIPLE


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Attributes:
      mesh: device mesh; one without devices serves planning.
      dtype: dtype of weights and activations.
      weight_dtype: int8 if the weights' matrices are in int8; auto for `dtype`.
      kv_cache_dtype: dtype of the KV cache, one of CACHE_DTYPES.
      prefill_chunk: prompt tokens per prefill step; a whole number of zigzag blocks, see Zigzag.
      compression: what layers keep of their KV cache; None for all that their queries see.
      sparse_prefill: how prompts attend to their keys; None for all of them.
      segment: decode steps between two checks for end-of-sequence.
      cache_block: block size of a quantized cache, see CacheSpec.
    """

    mesh: Mesh | AbstractMesh
    dtype: str
    kv_cache_dtype: str
    prefill_chunk: int
    weight_dtype: str = "auto"
    compression: Compression | None = None
    sparse_prefill: SparsePrefill | None = None
    segment: int = SEGMENT
    cache_block: int = BLOCK

    @property
    def zigzag(self) -> Zigzag:
        """Layout of positions along the context axis."""
        return zigzag_of(self.prefill_chunk, self.mesh.shape["context"])

    def span(self, length: int) -> int:
        """Returns how far apart positions get in a text of `length` tokens, at most."""
        return length if self.compression is None else self.compression.span(length)

    def cache_spec(
        self, batch: int, prompt_capacity: int, output: int, starts_anywhere: bool = False
    ) -> CacheSpec:
        """Returns the spec of a cache for `batch` prompts and their answers.

        There is room for the last chunk's padding and for whole segments. The first chunk starts
        at position 0, or anywhere.
        """
        padded = round_up(prompt_capacity, self.prefill_chunk)
        if starts_anywhere:
            padded = prompt_capacity + self.prefill_chunk
        needed = max(padded, prompt_capacity + round_up(output, self.segment))
        granule = (
            _LARGE_CAPACITY_MULTIPLE if needed > 8 * _LARGE_CAPACITY_MULTIPLE else CAPACITY_MULTIPLE
        )
        return CacheSpec(
            batch=batch,
            capacity=round_up(needed, granule * self.mesh.shape["context"]),
            dtype=self.kv_cache_dtype,
            compute_dtype=self.dtype,
            zigzag=self.zigzag,
            block=self.cache_block,
            chunk=self.prefill_chunk,
            prompt_capacity=prompt_capacity,
            policy=self.compression,
            sparse=self.sparse_prefill,
        )


def check_chunks(config: ModelConfig, settings: EngineConfig, length: int) -> None:
    """Refuses requests that need dual chunk attention where a cache forgets while it reads.

    Raises:
      UserError: a request of `length` tokens, prompt and output together, is one.
    """
    compression = settings.compression
    if compression is None or compression.by_layer:
        return
    if chunks_for(config, settings.span(length)):
        raise UserError(
            "a kv_compression that forgets while it reads (streaming_llm, or razor with streaming) "
            f"does not go with dual chunk attention, which {length} tokens need: what tokens of a "
            "prompt see of those before them belongs to no one chunk of positions; set "
            "kv_compression razor without streaming, or none, or ask for at most "
            f"{config.trained_length} tokens."
        )


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step
