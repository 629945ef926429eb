"""Options of running a model, resolved and checked before any weight is read."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from lsjax.attention.sparse.rule import SparsePrefill
from lsjax.cache import CACHE_DTYPES
from lsjax.checkpoint import holds_int8, read_model_config
from lsjax.compression import CompressionSettings, parse_compression
from lsjax.config import ModelConfig
from lsjax.distributed.sequence_layout import round_up_to_blocks
from lsjax.distributed.sharding import check_fits_mesh, make_mesh
from lsjax.families import refuse_gguf
from lsjax.families.generation_config import NAME, eos_token_ids, read_generation_config, unapplied
from lsjax.inference.engine_config import EngineConfig
from lsjax.inference.sampling import Sampling, suggested_sampling
from lsjax.inference.sparse_prefill import check_sparse_prefill, parse_sparse_prefill
from lsjax.nn.int8_weights import WEIGHT_DTYPES
from lsjax.positions.scaling import override_rope_scaling
from lsjax.runtime.errors import UserError
from lsjax.runtime.html import table
from lsjax.runtime.notes import note
from lsjax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EngineConfig):
    """Resolved options of running a model: the settings of its engine, and what it is.

    Attributes:
      folder: model folder.
      config: model configuration, with the effective rope scaling.
      eos_token_ids: ids that end an answer.
      suggested: sampling that the publisher suggests.
      tokenizer: tokenizer of the folder, or None if it has none.
    """

    folder: str
    config: ModelConfig
    eos_token_ids: frozenset[int]
    suggested: Sampling = Sampling()  # noqa: RUF009 (frozen)
    tokenizer: Tokenizer | None = None

    def _repr_html_(self) -> str:
        """Shows the effective options in a notebook."""
        c, devices = self.config, self.mesh.devices
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return table(
            {
                "model": f"{self.folder} ({c.architecture})",
                "trained length": f"{c.trained_length:,} tokens",
                "served length": f"{c.served_length:,} tokens",
                "rope scaling": c.rope_scaling.kind,
                "devices": f"{devices.size} x {devices.flat[0].device_kind} ({axes})",
                "weights": self.dtype if self.weight_dtype == "auto" else f"int8 at {self.dtype}",
                "KV cache": self.kv_cache_dtype,
                "KV compression": "none"
                if self.compression is None
                else type(self.compression).__name__,
                "sparse prefill": "off"
                if self.sparse_prefill is None
                else f"alpha {self.sparse_prefill.alpha:g}",
                "prefill chunk": f"{self.prefill_chunk:,} tokens",
            }
        )


def resolve_options(
    path: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    weight_dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    mesh: str | Mapping[str, int] | Mesh = "",
    rope_scaling: str | Mapping[str, Any] | None = None,
    prefill_chunk: int | None = None,
    kv_compression: str | Mapping[str, Any] | CompressionSettings | None = None,
    sparse_prefill: str | float | Mapping[str, Any] | SparsePrefill | None = None,
) -> Options:
    """Resolves and checks all options; see `lsjax.load` for the arguments.

    Raises:
      UserError: an option is wrong, or options conflict.
    """
    folder = os.fspath(path)
    refuse_gguf(folder)
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder} is not a folder; a model is a Hugging Face folder (config.json, "
            "*.safetensors, tokenizer files) or one that lsjax-convert has written."
        )
    config = override_rope_scaling(read_model_config(folder), rope_scaling)
    if not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    check_fits_mesh(config, mesh.shape)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if dtype == "auto":
        # A CPU multiplies bfloat16 faster than float32 only if it has instructions for it.
        dtype = "float32" if on_cpu or config.dtype == "float32" else "bfloat16"
    dtype = one_of("dtype", dtype, COMPUTE_DTYPES)
    if weight_dtype != "auto":
        one_of("weight_dtype", weight_dtype, WEIGHT_DTYPES)
    elif holds_int8(folder):
        weight_dtype = "int8"
    if kv_cache_dtype == "auto":
        kv_cache_dtype = dtype
    if prefill_chunk is None:
        prefill_chunk = 512 if on_cpu else 4096
    if prefill_chunk < 1:
        raise UserError(f"prefill_chunk must be at least 1 token, not {prefill_chunk}.")
    published = read_generation_config(folder)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    if asked := unapplied(published):
        note(f"generation_config.json sets {', '.join(asked)}, which lsjax does not support.")
    settings = parse_compression(kv_compression)
    prefill_chunk = round_up_to_blocks(prefill_chunk, mesh.shape["context"])
    options = Options(
        folder=folder,
        config=config,
        mesh=mesh,
        dtype=dtype,
        weight_dtype=weight_dtype,
        kv_cache_dtype=one_of("kv_cache_dtype", kv_cache_dtype, CACHE_DTYPES),
        prefill_chunk=prefill_chunk,
        eos_token_ids=_eos_ids(config, published, tokenizer),
        suggested=suggested_sampling(published),
        tokenizer=tokenizer,
        compression=settings and settings.resolve(folder, config, mesh.shape["model"]),
        sparse_prefill=parse_sparse_prefill(sparse_prefill),
    )
    return changed(options)


def changed(options: Options, **changes: Any) -> Options:
    """Returns options with changes.

    Raises:
      UserError: sparse prefill does not go with them.
    """
    options = dataclasses.replace(options, **changes)
    if options.sparse_prefill:
        check_sparse_prefill(options.config, options.mesh.devices.flat[0].platform, options)
    return options


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """Returns the value if it is allowed.

    Raises:
      UserError: the value is not allowed; the message lists the allowed ones.
    """
    if value not in allowed:
        raise UserError(f"{name} {value!r} is not known; use auto, {', '.join(allowed)}.")
    return value


def _eos_ids(
    config: ModelConfig, published: Mapping[str, Any], tokenizer: Tokenizer | None
) -> frozenset[int]:
    """Returns all end ids: config.json's, generation_config.json's and the tokenizer's."""
    ids = {*config.eos_token_ids, *eos_token_ids(published, NAME)}
    return frozenset(ids | set(tokenizer.eos_ids if tokenizer else ()))


def end_of_documents(
    folder: str | None, config: ModelConfig, tokenizer: Tokenizer | None
) -> int | None:
    """Returns the id that ends a training document, or None.

    It is the first end-of-sequence id of config.json, else of the folder's generation_config.json,
    else of the tokenizer.
    """
    first = config.eos_token_ids
    if not first and folder is not None:
        first = eos_token_ids(read_generation_config(folder), NAME)
    if not first and tokenizer is not None:
        first = tokenizer.eos_ids
    return first[0] if first else None
