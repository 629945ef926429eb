"""The planner: whether a model fits a target, the longest prompt that does, and the best layout."""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lsjax.attention.sparse.rule import SparsePrefill
from lsjax.cache import CACHE_DTYPES
from lsjax.checkpoint import holds_int8
from lsjax.compression import (
    Compression,
    CompressionSettings,
    parse_compression,
    served_length,
)
from lsjax.config import MAX_POSITIONS, ModelConfig
from lsjax.distributed.sequence_layout import round_up_to_blocks
from lsjax.distributed.sharding import AXES, abstract_mesh, check_fits_mesh, parse_mesh
from lsjax.documents import check_options
from lsjax.families import read_config
from lsjax.inference.engine_config import check_chunks
from lsjax.inference.options import COMPUTE_DTYPES, one_of
from lsjax.inference.request import check_total
from lsjax.inference.sparse_prefill import check_sparse_prefill, parse_sparse_prefill
from lsjax.nn.int8_weights import WEIGHT_DTYPES
from lsjax.planning.arithmetic import needs_of
from lsjax.planning.compiled import ask_compiler
from lsjax.planning.deployment import Deployment, MemoryUsage
from lsjax.planning.result import Plan, fits
from lsjax.planning.shared_document import DocumentPlan, saved_bytes
from lsjax.planning.speed import expected_speed
from lsjax.planning.targets import Target, find_target
from lsjax.positions.scaling import override_rope_scaling
from lsjax.runtime.errors import UserError

# Prefill chunks that are compared, in tokens; rounded up where a context axis needs it.
_CHUNKS = (4096, 8192, 16384, 32768)
_MOST_ROWS = 4096  # on each device of the data axis


def plan(
    config: str | os.PathLike[str] | ModelConfig,
    target: str | Target,
    *,
    max_input_length: int | None = None,
    max_output_length: int = 256,
    max_batch_size: int = 1,
    mesh: str | Mapping[str, int] = "",
    dtype: str = "auto",
    weight_dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    kv_compression: str | Mapping[str, Any] | CompressionSettings | None = None,
    sparse_prefill: str | float | Mapping[str, Any] | SparsePrefill | None = None,
    prefill_chunk: int | None = None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    allow_untrained_length: bool = False,
    document_length: int = 0,
    compile: bool = False,
) -> Plan:
    """Plans what a model needs on devices that need not be present, before any weight is read.

    Args:
      config: config.json, a model folder, or a ModelConfig.
      target: devices to plan for, such as "v5e:2x4", "h100-80gb:8", "cpu:8" or "here"; the error
        for an unknown name lists all of them.
      max_input_length: prompt length in tokens, without the document; None for the longest that
        fits.
      max_output_length: number of tokens to generate.
      max_batch_size: number of prompts answered together.
      mesh: devices per mesh axis, as in `lsjax.load`; "" for the best found.
      dtype: dtype of weights and activations; auto is float32 on CPU, otherwise bfloat16.
      weight_dtype: dtype of weight matrices: int8, or auto for `dtype` (or for int8 if that is what
        a converted folder holds).
      kv_cache_dtype: dtype of the KV cache; auto for the best found.
      kv_compression: KV compression, as in `lsjax.load`; unless razor names a file of heads, the
        heads that keep everything are assumed to be spread evenly over the layers.
      sparse_prefill: how prompts attend to their keys, as in `lsjax.load`.
      prefill_chunk: prompt tokens per prefill step; None for the best found.
      rope_scaling: RoPE scaling, as in `lsjax.load`.
      allow_untrained_length: whether to allow sequences longer than the model serves.
      document_length: tokens of a document that all prompts begin with, see LanguageModel.read; 0
        for none.
      compile: whether to take memory from the target's compiler (minutes) instead of from
        arithmetic (immediate).

    Raises:
      UserError: an argument is wrong, arguments conflict, or the length is more than the model
        serves; the message says what is possible.
    """
    if weight_dtype != "auto":
        one_of("weight_dtype", weight_dtype, WEIGHT_DTYPES)
    if not isinstance(config, ModelConfig):
        if weight_dtype == "auto" and holds_int8(os.fspath(config)):
            weight_dtype = "int8"
        config = read_config(config)
    config = override_rope_scaling(config, rope_scaling)
    if not isinstance(target, Target):
        target = find_target(target)
    compression = parse_compression(kv_compression)
    kept = compression and compression.estimate(config, 1)
    if max_input_length is not None:
        prompt = document_length + max_input_length
        if not allow_untrained_length:
            check_total(config, prompt + max_output_length, prompt, kept)
    output = document_length + max_output_length
    bound = longest_served(config, output, allow_untrained_length, kept)
    if dtype == "auto":
        dtype = "float32" if target.platform == "cpu" else "bfloat16"
    one_of("dtype", dtype, COMPUTE_DTYPES)
    if kv_cache_dtype != "auto":
        one_of("kv_cache_dtype", kv_cache_dtype, CACHE_DTYPES)
    free = SearchSpace(
        *(config, target, dtype, weight_dtype, max_batch_size, max_output_length, compression),
        document_length,
        sparse_prefill=parse_sparse_prefill(sparse_prefill),
    )
    asked = dataclasses.replace(
        free,
        mesh=_checked_mesh(config, target, mesh, max_batch_size) if mesh else None,
        kv_cache_dtype=None if kv_cache_dtype == "auto" else kv_cache_dtype,
        prefill_chunk=prefill_chunk,
    )
    deployment = asked.best(max_input_length, bound)
    check_chunks(config, deployment, output + (max_input_length or 1))
    if deployment.sparse_prefill:
        check_sparse_prefill(config, target.platform, deployment)
    if document_length:
        check_options(deployment)
    recommended = deployment if asked == free else free.best(max_input_length, bound)
    longest = longest_that_fits(config, target, deployment, bound)
    if compile:
        programs, longest = ask_compiler(
            config, target, deployment, max_input_length, longest, bound
        )
    length = max_input_length or max(longest, 1)
    lengths = {length, *_table_lengths(longest, bound)}
    table = {n: needs_of(config, target.platform, deployment, n) for n in sorted(lengths)}
    return Plan(
        config=config,
        target=target,
        deployment=deployment,
        length=length,
        programs=programs if compile else table[length],
        max_length=longest,
        limited_by="positions" if longest == bound else "memory",
        recommended=recommended,
        reasons=tuple(free.reasons(recommended, length)),
        table=table,
        speed=expected_speed(config, target, deployment, length),
        compiled=compile,
        document=_document_plan(config, target, deployment, length) if document_length else None,
    )


def _document_plan(
    config: ModelConfig, target: Target, deployment: Deployment, length: int
) -> DocumentPlan:
    """Returns what a document takes, and how many questions of `length` tokens fit, by arithmetic.

    The number is a multiple of the data axis.
    """
    rows = deployment.sizes["data"]

    def too_many(n: int) -> bool:
        more = dataclasses.replace(deployment, batch=n * rows)
        return not fits(target, needs_of(config, target.platform, more, length))

    return DocumentPlan(
        tokens=deployment.document_length,
        saved_bytes=saved_bytes(config, deployment),
        questions=rows * bisect.bisect_left(range(1, _MOST_ROWS), True, key=too_many),
    )


def longest_served(
    config: ModelConfig,
    output_length: int,
    allow_untrained_length: bool,
    compression: Compression | None,
) -> int:
    """Returns the longest prompt that the model serves, in tokens.

    With allow_untrained_length, only the range of positions bounds it.

    Raises:
      UserError: the output leaves no room for a prompt.
    """
    served = MAX_POSITIONS if allow_untrained_length else served_length(config, compression)
    served = min(served, MAX_POSITIONS)
    if served <= output_length:
        raise UserError(
            f"max_output_length {output_length:,} leaves no room for a prompt: the model serves "
            f"{served:,} tokens."
        )
    return served - output_length


def longest_that_fits(
    config: ModelConfig, target: Target, deployment: Deployment, bound: int
) -> int:
    """Returns the longest prompt up to `bound` that fits, by arithmetic; 0 if none does."""
    low, high = 0, bound
    while low < high:
        middle = (low + high + 1) // 2
        if fits(target, needs_of(config, target.platform, deployment, middle)):
            low = middle
        else:
            high = middle - 1
    return low


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The layouts to choose from; a setting that is None is free.

    Attributes:
      config: model configuration.
      target: devices to plan for.
      compression: settings of KV compression, or None for none.
      dtype, weight_dtype, batch, output_length, document_length, sparse_prefill, mesh,
        kv_cache_dtype, prefill_chunk: settings of the layouts, see Deployment.
    """

    config: ModelConfig
    target: Target
    dtype: str
    weight_dtype: str
    batch: int
    output_length: int
    compression: CompressionSettings | None
    document_length: int = 0
    sparse_prefill: SparsePrefill | None = None
    mesh: tuple[int, int, int] | None = None
    kv_cache_dtype: str | None = None
    prefill_chunk: int | None = None

    def best(self, length: int | None, bound: int) -> Deployment:
        """Returns one of the fastest layouts that fit prompts of `length` tokens.

        If none fits, or `length` is None, returns one that fits about the longest prompt. An int4
        cache is chosen only if no layout with int8 fits.
        """
        for dtype in (self.kv_cache_dtype,) if self.kv_cache_dtype else ("int8", "int4"):
            layouts = list(self.layouts(dtype))
            if length is not None:
                if fitting := [x for x in layouts if self.fits(x, length)]:
                    return self.smallest_within_5_percent(fitting, length)
            elif any(self.fits(x, 1) for x in layouts):
                break
        room = {x: longest_that_fits(self.config, self.target, x, bound) for x in layouts}
        most = max(room.values())
        if not most:  # nothing fits: take the layout that comes closest
            return min(layouts, key=lambda x: self.most_bytes(x, 1))
        near = [x for x in layouts if room[x] >= 0.95 * most]
        return self.smallest_within_5_percent(near, most)

    def smallest_within_5_percent(self, layouts: Sequence[Deployment], length: int) -> Deployment:
        """Returns the layout with the least memory among those within 5% of the fastest."""
        seconds = {x: self.seconds(x, length) for x in layouts}
        fast = [x for x in layouts if seconds[x] <= 1.05 * min(seconds.values())]
        return min(fast, key=lambda x: self.most_bytes(x, length))

    def most_bytes(self, deployment: Deployment, length: int) -> int:
        return max(n.total for n in self.needs(deployment, length).values())

    def fits(self, deployment: Deployment, length: int) -> bool:
        return fits(self.target, self.needs(deployment, length))

    def needs(self, deployment: Deployment, length: int) -> dict[str, MemoryUsage]:
        return needs_of(self.config, self.target.platform, deployment, length)

    def seconds(self, deployment: Deployment, length: int) -> float:
        """Returns the expected seconds per batch, or 0 if the target's rates are unknown."""
        speed = expected_speed(self.config, self.target, deployment, length)
        if speed is None:
            return 0.0
        written = deployment.batch * deployment.output_length
        prefill = speed.prefill_seconds
        if deployment.sparse_prefill:  # None if it is refused
            prefill = speed.sparse_prefill_seconds or prefill
        return prefill + written / speed.decode_tokens_per_second

    def layouts(self, kv_cache_dtype: str) -> Iterable[Deployment]:
        """Yields all layouts with a cache of this dtype."""
        for mesh in [self.mesh] if self.mesh else self.meshes():
            compression = self.compression and self.compression.estimate(self.config, mesh[2])
            for chunk in self.chunks(mesh[1]):
                yield Deployment(
                    mesh=abstract_mesh(mesh),
                    dtype=self.dtype,
                    weight_dtype=self.weight_dtype,
                    kv_cache_dtype=kv_cache_dtype,
                    prefill_chunk=chunk,
                    compression=compression,
                    sparse_prefill=self.sparse_prefill,
                    batch=self.batch,
                    output_length=self.output_length,
                    document_length=self.document_length,
                )

    def meshes(self) -> list[tuple[int, int, int]]:
        """Returns the meshes that use all devices and divide the model and the batch.

        Raises:
          UserError: there is no such mesh.
        """
        count = self.target.devices
        found = []
        for data, model in itertools.product(range(1, count + 1), repeat=2):
            if self.batch % data or count % (data * model):
                continue
            mesh = (data, count // (data * model), model)
            try:
                check_fits_mesh(self.config, dict(zip(AXES, mesh, strict=True)))
            except UserError:
                continue
            found.append(mesh)
        if not found:
            raise UserError(f"no mesh of {count} devices divides the model; use fewer devices.")
        return found

    def chunks(self, context: int) -> Sequence[int]:
        """Returns the prefill chunks to choose from."""
        if self.prefill_chunk:
            return [round_up_to_blocks(self.prefill_chunk, context)]
        if self.target.platform == "cpu":
            return [round_up_to_blocks(512, context)]
        return [round_up_to_blocks(chunk, context) for chunk in _CHUNKS]

    def reasons(self, best: Deployment, length: int) -> Iterable[str]:
        """Yields sentences that say why a layout was chosen over the others."""
        if not self.fits(best, length):
            yield f"it comes nearest to holding {length:,} tokens, which none does"
            narrow = dataclasses.replace(self, weight_dtype="int8")
            way = narrow.best(length, length)
            if self.weight_dtype == "auto" and narrow.fits(way, length):
                yield (
                    f"--weight_dtype int8 --kv_cache_dtype {way.kv_cache_dtype} --mesh "
                    f"{way.mesh_text} would hold them"
                )
            return
        if best.kv_cache_dtype == "int8":
            yield "an int8 cache answers as a float one does, in half of bfloat16's memory or less"
        else:
            yield "an int8 cache does not fit, one of int4 costs accuracy"
        others = [x for x in self.layouts(best.kv_cache_dtype) if x.mesh != best.mesh]
        fitting = [x for x in others if self.fits(x, length)]
        if fitting and self.seconds(best, length):
            second = min(fitting, key=lambda x: self.seconds(x, length))
            yield (
                f"mesh {best.mesh_text} is expected to take {self.seconds(best, length):,.0f} s a "
                f"request, {second.mesh_text} {self.seconds(second, length):,.0f} s"
            )
        elif others and not fitting:
            yield f"no other mesh of {self.target.devices} devices holds {length:,} tokens"
        if best.compression:
            yield best.compression.summary(self.config, self.document_length or length)
        if best.sizes["context"] > 1:
            yield "each chunk gathers the weights once, so that fewer, larger chunks send less"


def _checked_mesh(
    config: ModelConfig, target: Target, mesh: str | Mapping[str, int], batch: int
) -> tuple[int, int, int]:
    sizes = parse_mesh(mesh)
    data, context, model = sizes.values()
    if data * context * model > target.devices:
        raise UserError(
            f"the mesh needs {data * context * model} devices, but {target.name} has "
            f"{target.devices}; ask for a smaller mesh or a larger target."
        )
    if batch % data:
        raise UserError(
            f"max_batch_size {batch} cannot be split over data={data}; make it a multiple."
        )
    check_fits_mesh(config, sizes)
    return data, context, model


def _table_lengths(longest: int, bound: int) -> list[int]:
    """Returns powers of two around the longest prompt that fits, and that prompt's length."""
    powers = [2**i for i in range(13, 23) if longest / 32 <= 2**i <= min(2 * longest, bound)]
    return [*powers, longest] if longest else powers
