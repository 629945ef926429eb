"""What the keys and values of a document depend on, so that none are used with another model."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lsjax.config import ModelConfig
from lsjax.distributed.sharding import sharding
from lsjax.inference.engine_config import EngineConfig
from lsjax.nn.parameters import flatten
from lsjax.runtime.errors import UserError

_SAMPLES = 8  # entries of a weight that are compared along each axis


def fingerprint(config: ModelConfig, settings: EngineConfig, params: dict) -> dict[str, str]:
    """Returns what keys and values depend on, by name, in a few characters each.

    Weights are known by their names, shapes, and a sample of their entries.
    """
    scaling = {k: v for k, v in dataclasses.asdict(config.rope_scaling).items() if v is not None}
    architecture = dataclasses.replace(config, rope_scaling=None, dtype="")
    sparse = settings.sparse_prefill
    return {
        "architecture": _hash(_told(architecture).encode()),
        "weights": _hash_of_weights(config, settings, params),
        "rope_scaling": json.dumps(scaling, sort_keys=True, default=list),
        "dtype": settings.dtype,
        "weight_dtype": settings.weight_dtype,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "block": str(settings.cache_block),
        "sparse_prefill": str(sparse and _told(sparse)),
        "kv_compression": str(settings.compression and settings.compression.identity),
    }


def check_fingerprint(where: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Refuses a document of another model.

    Raises:
      UserError: the fingerprints differ; the message names the first difference.
    """
    for name, value in wanted.items():
        if found.get(name, "None") != value:  # saved before there was such an option
            raise UserError(
                f"{where} was read with another {name} ({found.get(name)}, not {value}); load the "
                "model as it was, or read the document again."
            )


def hash_of_ids(ids: Sequence[int]) -> str:
    return _hash(np.asarray(ids, "<i4").tobytes())


def _told(settings: Any) -> str:
    """Describes a dataclass as JSON, without fields that have their defaults.

    So a field that is added later leaves what was saved before as it is.
    """

    def plain(x: Any) -> Any:
        if isinstance(x, tuple):
            return [plain(value) for value in x]
        if not dataclasses.is_dataclass(x):
            return x
        fields = {f.name: f.default for f in dataclasses.fields(x)}
        given = {n: getattr(x, n) for n, default in fields.items() if getattr(x, n) != default}
        return {type(x).__name__: {name: plain(value) for name, value in given.items()}}

    return json.dumps(plain(settings), sort_keys=True)


def _hash_of_weights(config: ModelConfig, settings: EngineConfig, params: dict) -> str:
    found = hashlib.sha256()
    moved = settings.compression.moved_channels(config) if settings.compression else {}
    # A program per shape of a weight is compiled sooner than one for all weights.
    replicated = sharding(settings.mesh, PartitionSpec())
    sample = jax.jit(_sample, static_argnames=["axis"], out_shardings=replicated)
    samples = {}
    for path, x in flatten(params).items():
        axis, old = moved.get(path, (None, None))
        # Those of the checkpoint, wherever they are.
        places = None if axis is None else np.argsort(old)[:: _every(x.shape[axis])]
        samples[path] = x.shape, sample(x, places, axis=axis)
    for path, (shape, x) in sorted(samples.items()):
        found.update(f"{path} {shape}".encode())
        found.update(np.asarray(x, np.float32).tobytes())
    return found.hexdigest()[:16]


def _sample(x: jax.Array, places: jax.Array | None, *, axis: int | None) -> jax.Array:
    """Samples each axis of a weight evenly, but one at the places that are given."""
    each = [slice(None, None, 1 if i == axis else _every(n)) for i, n in enumerate(x.shape)]
    return (x if axis is None else jnp.take(x, places, axis=axis))[tuple(each)].astype(jnp.float32)


def _every(size: int) -> int:
    return max(1, size // _SAMPLES)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
