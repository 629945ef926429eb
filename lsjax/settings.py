"""How a model is to be run: decided and checked before a weight is read."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from lsjax.cache import BLOCK, CACHE_DTYPES, whole_stripes
from lsjax.checkpoint import read_model_config
from lsjax.compression import Compression, Razor, compression_of, parse_compression
from lsjax.config import ModelConfig
from lsjax.engine import SEGMENT
from lsjax.errors import UserError
from lsjax.generation_config import (
    NAME,
    eos_token_ids,
    read_generation_config,
    suggested_sampling,
    unapplied,
)
from lsjax.notes import note
from lsjax.positions.scaling import override_rope_scaling
from lsjax.sampling import Sampling
from lsjax.sharding import check_fits_mesh, make_mesh
from lsjax.shipped import shipped_model_path
from lsjax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is to be run; settled, and checked, before a weight is read.

    Attributes:
      folder: the model's.
      config: with the rope scaling in force.
      mesh: the devices.
      dtype: of weights and activations.
      kv_cache_dtype: one of CACHE_DTYPES.
      prefill_chunk: tokens of prompt run at once; on a context axis, as many as asked for or a few
        more, so that every device gets its share.
      eos_token_ids: any of these ends an answer.
      compression: of the KV heads, or None.
      suggested: how the publisher draws tokens.
      tokenizer: the folder's; None where it has none.
      segment: steps of decoding between two looks at the end-of-sequence.
      cache_block: positions that a quantised cache keeps in floats, see CacheSpec.
    """

    folder: str
    config: ModelConfig
    mesh: Mesh
    dtype: str
    kv_cache_dtype: str
    prefill_chunk: int
    eos_token_ids: frozenset[int]
    compression: Compression | None = None
    suggested: Sampling = Sampling()  # noqa: RUF009 (frozen)
    tokenizer: Tokenizer | None = None
    segment: int = SEGMENT
    cache_block: int = BLOCK


def settle(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    mesh: str | Mapping[str, int] | Mesh = "",
    rope_scaling: str | Mapping[str, Any] | None = None,
    prefill_chunk: int | None = None,
    kv_compression: str | Mapping[str, Any] | Razor | None = None,
) -> Settings:
    """Decides everything that `load` leaves open; see `load` for the arguments.

    Raises:
      UserError: what was asked for does not exist, or does not go together.
    """
    folder = os.fspath(shipped_model_path() if path is None else path)
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder} is not a folder; a model is a Hugging Face folder (config.json, "
            "*.safetensors, tokenizer files) or one that hf_to_orbax.py has written."
        )
    config = override_rope_scaling(read_model_config(folder), rope_scaling)
    if not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    check_fits_mesh(config, mesh.shape)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if dtype == "auto":
        # A CPU multiplies bfloat16 matrices by one vector fifteen times slower than float32.
        dtype = "float32" if on_cpu or config.dtype == "float32" else "bfloat16"
    dtype = one_of("dtype", dtype, COMPUTE_DTYPES)
    if kv_cache_dtype == "auto":
        kv_cache_dtype = dtype
    if prefill_chunk is None:
        prefill_chunk = 512 if on_cpu else 4096
    if prefill_chunk < 1:
        raise UserError(f"prefill_chunk must be at least 1 token, not {prefill_chunk}.")
    published = read_generation_config(folder)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    if asked := unapplied(published):
        note(f"generation_config.json sets {', '.join(asked)}, which nothing here does.")
    razor = parse_compression(kv_compression)
    prefill_chunk = whole_stripes(prefill_chunk, mesh.shape["context"])
    return Settings(
        folder=folder,
        config=config,
        mesh=mesh,
        dtype=dtype,
        kv_cache_dtype=one_of("kv_cache_dtype", kv_cache_dtype, CACHE_DTYPES),
        prefill_chunk=prefill_chunk,
        eos_token_ids=_eos_ids(config, published, tokenizer),
        suggested=suggested_sampling(published),
        tokenizer=tokenizer,
        compression=razor and compression_of(razor, folder, config, mesh.shape["model"]),
    )


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """The value, where it is allowed.

    Raises:
      UserError: it is not; lists what is.
    """
    if value not in allowed:
        raise UserError(f"{name} {value!r} is not known; use auto, {', '.join(allowed)}.")
    return value


def _eos_ids(
    config: ModelConfig, published: Mapping[str, Any], tokenizer: Tokenizer | None
) -> frozenset[int]:
    """All that end an answer: config.json's, generation_config.json's and the tokenizer's."""
    ids = {*config.eos_token_ids, *eos_token_ids(published, NAME)}
    return frozenset(ids | set(tokenizer.eos_ids if tokenizer else ()))


def end_of_documents(
    folder: str | None, config: ModelConfig, tokenizer: Tokenizer | None
) -> int | None:
    """The first of these, in that order, which ends a document that is trained on."""
    first = config.eos_token_ids
    if not first and folder is not None:
        first = eos_token_ids(read_generation_config(folder), NAME)
    if not first and tokenizer is not None:
        first = tokenizer.eos_ids
    return first[0] if first else None
