"""Does it fit, how long a text would, and which settings are best."""

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lsjax.cache import CACHE_DTYPES, whole_stripes
from lsjax.compression import Razor, assumed, parse_compression
from lsjax.config import MAX_POSITIONS, ModelConfig
from lsjax.errors import UserError
from lsjax.families import read_config
from lsjax.planning.arithmetic import cache_bytes, needs_of
from lsjax.planning.compiled import TooLargeError, compile_for
from lsjax.planning.layout import Layout
from lsjax.planning.needs import Needs
from lsjax.planning.speed import Speed, expected_speed
from lsjax.planning.targets import Target, find_target
from lsjax.positions.scaling import override_rope_scaling
from lsjax.requests import check_exact_length, check_total
from lsjax.settings import COMPUTE_DTYPES, one_of
from lsjax.sharding import check_fits_mesh, parse_mesh

# By the compiler's word: no more than this share of the longest text may be left unused. To ask
# takes a minute, so what is asked first is likely to be right.
_TIGHT = 0.04
_ROUNDS = 4
# Chunks that are weighed against one another, a device of the context axis.
_CHUNKS = (4096, 8192, 16384, 32768)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model takes of a target.

    Attributes:
      config: the model.
      target: the devices.
      layout: how it is laid out on them: as asked for, or else as recommended.
      length: tokens of prompt that were asked for, or the longest if none were.
      programs: needs of "prefill" and "decode" at that length.
      max_length: the longest prompt that fits; 0 for none.
      limited_by: what keeps it from being longer: "memory", or the model's "positions".
      recommended: the layout that would be best.
      reasons: why, in sentences.
      table: length -> needs, from short to long.
      speed: what is expected at that length, by rates and not by measurement; None where the
        target's are not known.
      compiled: whether bytes are the compiler's, or arithmetic's.
    """

    config: ModelConfig
    target: Target
    layout: Layout
    length: int
    programs: dict[str, Needs]
    max_length: int
    limited_by: str
    recommended: Layout
    reasons: tuple[str, ...]
    table: dict[int, dict[str, Needs]]
    speed: Speed | None
    compiled: bool

    @property
    def fits(self) -> bool:
        return fits(self.target, self.programs)

    def as_json(self) -> dict[str, Any]:
        """The figures, in bytes a device and tokens."""
        return {
            "fits": self.fits,
            "max_length": self.max_length,
            "limited_by": self.limited_by,
            "recommended": _as_flags(self.recommended) | {"reasons": list(self.reasons)},
            "programs": _with_totals(self.programs, self.target),
            "model": self.config.architecture,
            "target": self.target.name,
            "devices": self.target.devices,
            "length": self.length,
            "settings": _as_flags(self.layout),
            "compiled": self.compiled,
            "expected": self.speed and dataclasses.asdict(self.speed),
            "table": [
                {"length": n, "programs": _with_totals(needs, self.target)}
                for n, needs in self.table.items()
            ],
        }


def plan(
    config: str | os.PathLike[str] | ModelConfig,
    target: str | Target,
    *,
    max_input_length: int | None = None,
    max_output_length: int = 256,
    max_batch_size: int = 1,
    mesh: str | Mapping[str, int] = "",
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    kv_compression: str | Mapping[str, Any] | Razor | None = None,
    prefill_chunk: int | None = None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    allow_untrained_length: bool = False,
    compile: bool = False,
) -> Plan:
    """Says what a model takes of some devices, which need not be here, before a weight is read.

    Args:
      config: a config.json, or a model folder.
      target: as in "v5e:2x4", "h100-80gb:8", "cpu:8", or "here"; an unknown one lists them.
      max_input_length: tokens of prompt; None for the longest that fits.
      max_output_length: tokens to generate.
      max_batch_size: prompts answered together.
      mesh: as in `lsjax.load`; nothing for the one that is recommended.
      dtype: of weights and activations; auto is float32 on a CPU and bfloat16 elsewhere.
      kv_cache_dtype: auto for the one that is recommended.
      kv_compression: as in `lsjax.load`; heads that keep everything are taken to be spread evenly.
      prefill_chunk: None for the one that is recommended.
      rope_scaling: as in `lsjax.load`.
      allow_untrained_length: plan past the length that the model is meant for.
      compile: ask the target's compiler (minutes), instead of arithmetic (at once).

    Raises:
      UserError: something does not exist or does not go together, or the length is past what the
        model serves; says what is possible.
    """
    if not isinstance(config, ModelConfig):
        config = read_config(config)
    config = override_rope_scaling(config, rope_scaling)
    if not isinstance(target, Target):
        target = find_target(target)
    if max_input_length is not None:
        check_exact_length(config, max_input_length + max_output_length)
        if not allow_untrained_length:
            check_total(config, max_input_length + max_output_length, max_input_length)
    bound = longest_served(config, max_output_length, allow_untrained_length)
    if dtype == "auto":
        dtype = "float32" if target.platform == "cpu" else "bfloat16"
    one_of("dtype", dtype, COMPUTE_DTYPES)
    if kv_cache_dtype != "auto":
        one_of("kv_cache_dtype", kv_cache_dtype, CACHE_DTYPES)
    razor = parse_compression(kv_compression)
    free = _Choices(config, target, dtype, max_batch_size, max_output_length, razor)
    asked = dataclasses.replace(
        free,
        mesh=_checked_mesh(config, target, mesh, max_batch_size) if mesh else None,
        kv_cache_dtype=None if kv_cache_dtype == "auto" else kv_cache_dtype,
        prefill_chunk=prefill_chunk,
    )
    layout = asked.best(max_input_length, bound)
    recommended = layout if asked == free else free.best(max_input_length, bound)
    longest = longest_that_fits(config, target, layout, bound)
    if compile:
        programs, longest = _ask_compiler(config, target, layout, max_input_length, longest, bound)
    length = max_input_length or max(longest, 1)
    lengths = {length, *_table_lengths(longest, bound)}
    table = {n: needs_of(config, target.platform, layout, n) for n in sorted(lengths)}
    return Plan(
        config=config,
        target=target,
        layout=layout,
        length=length,
        programs=programs if compile else table[length],
        max_length=longest,
        limited_by="positions" if longest == bound else "memory",
        recommended=recommended,
        reasons=tuple(free.reasons(recommended, length)),
        table=table,
        speed=expected_speed(config, target, layout, length),
        compiled=compile,
    )


def longest_served(config: ModelConfig, output_length: int, allow_untrained_length: bool) -> int:
    """The longest prompt that a model is meant for, or that positions reach.

    Raises:
      UserError: the output leaves no room for any.
    """
    served = MAX_POSITIONS if allow_untrained_length else config.served_length
    served = min(served, MAX_POSITIONS, config.exact_length or MAX_POSITIONS)
    if served <= output_length:
        raise UserError(
            f"max_output_length {output_length:,} leaves no room for a prompt: the model serves "
            f"{served:,} tokens."
        )
    return served - output_length


def fits(target: Target, programs: Mapping[str, Needs]) -> bool:
    """Whether a device holds each of the programs."""
    return all(needs.total <= target.memory for needs in programs.values())


def longest_that_fits(config: ModelConfig, target: Target, layout: Layout, bound: int) -> int:
    """The longest prompt up to `bound` that fits, by arithmetic; 0 if none does."""
    low, high = 0, bound
    while low < high:
        middle = (low + high + 1) // 2
        if fits(target, needs_of(config, target.platform, layout, middle)):
            low = middle
        else:
            high = middle - 1
    return low


def _ask_compiler(
    config: ModelConfig,
    target: Target,
    layout: Layout,
    length: int | None,
    longest: int,
    bound: int,
) -> tuple[dict[str, Needs], int]:
    """The compiler's needs at a length, and the longest that it lets through.

    Args:
      length: None for the longest.
      longest: to begin with.
      bound: lengths end there.
    """

    def ask(n: int) -> dict[str, Needs] | None:
        try:
            return compile_for(config, target, layout, n)
        except TooLargeError:
            return None

    guess = max(longest if longest == bound else int(longest * (1 - _TIGHT / 2)), 1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        wanted = sorted({length or guess, guess})
        answers = dict(zip(wanted, pool.map(ask, wanted), strict=True))
    far = guess + 2**20
    sizes = [cache_bytes(config, target.platform, layout, n) for n in (guess, far)]
    step = (sizes[1] - sizes[0]) / (far - guess)  # bytes a token
    best = 0
    for _ in range(_ROUNDS):
        if guess not in answers:
            answers[guess] = ask(guess)
        found = answers[guess]
        if found is None:  # it says no more than no
            guess = max(1, int(guess * (1 - _TIGHT)))
            continue
        room = (target.memory - max(n.total for n in found.values())) / step
        if room >= 0:
            best = max(best, guess)
        if 0 <= room <= _TIGHT * guess or (room >= 0 and guess == bound):
            break
        guess = min(bound, max(1, int(guess + room - _TIGHT / 2 * guess)))
    length = length or best or guess
    return answers[length] or needs_of(config, target.platform, layout, length), best


@dataclasses.dataclass(frozen=True)
class _Choices:
    """Layouts to choose from: what is None is free.

    Attributes are those of Layout.
    """

    config: ModelConfig
    target: Target
    dtype: str
    batch: int
    output_length: int
    razor: Razor | None
    mesh: tuple[int, int, int] | None = None
    kv_cache_dtype: str | None = None
    prefill_chunk: int | None = None

    def best(self, length: int | None, bound: int) -> Layout:
        """The fastest layout that fits `length`; else, or for None, one that fits most.

        A cache in four bits only where one in eight does not do.
        """
        for dtype in (self.kv_cache_dtype,) if self.kv_cache_dtype else ("int8", "int4"):
            layouts = list(self.layouts(dtype))
            if length is not None:
                if fitting := [x for x in layouts if self.fits(x, length)]:
                    return self.leanest_of_the_fast(fitting, length)
            elif any(self.fits(x, 1) for x in layouts):
                break
        room = {x: longest_that_fits(self.config, self.target, x, bound) for x in layouts}
        most = max(room.values())
        if not most:  # then the one that is nearest to fitting
            return min(layouts, key=lambda x: self.most_bytes(x, 1))
        near = [x for x in layouts if room[x] >= 0.95 * most]
        return self.leanest_of_the_fast(near, most)

    def leanest_of_the_fast(self, layouts: Sequence[Layout], length: int) -> Layout:
        """Of those that are about as fast as the fastest, the one that takes least memory."""
        seconds = {x: self.seconds(x, length) for x in layouts}
        fast = [x for x in layouts if seconds[x] <= 1.05 * min(seconds.values())]
        return min(fast, key=lambda x: self.most_bytes(x, length))

    def most_bytes(self, layout: Layout, length: int) -> int:
        return max(n.total for n in self.needs(layout, length).values())

    def fits(self, layout: Layout, length: int) -> bool:
        return fits(self.target, self.needs(layout, length))

    def needs(self, layout: Layout, length: int) -> dict[str, Needs]:
        return needs_of(self.config, self.target.platform, layout, length)

    def seconds(self, layout: Layout, length: int) -> float:
        """Of a request; 0 where rates are not known."""
        speed = expected_speed(self.config, self.target, layout, length)
        if speed is None:
            return 0.0
        written = layout.batch * layout.output_length
        return speed.prefill_seconds + written / speed.decode_tokens_per_second

    def layouts(self, kv_cache_dtype: str) -> Iterable[Layout]:
        """All with a cache of this dtype."""
        for mesh in [self.mesh] if self.mesh else self.meshes():
            compression = self.razor and assumed(self.razor, self.config, mesh[2])
            for chunk in self.chunks(mesh[1]):
                yield Layout(
                    mesh,
                    self.dtype,
                    kv_cache_dtype,
                    chunk,
                    self.batch,
                    self.output_length,
                    compression,
                )

    def meshes(self) -> list[tuple[int, int, int]]:
        """Those that take all devices and divide the model and the batch."""
        count = self.target.devices
        found = []
        for data, model in itertools.product(range(1, count + 1), repeat=2):
            if self.batch % data or count % (data * model):
                continue
            mesh = (data, count // (data * model), model)
            try:
                check_fits_mesh(self.config, {"model": model})
            except UserError:
                continue
            found.append(mesh)
        if not found:
            raise UserError(f"no mesh of {count} devices divides the model; use fewer devices.")
        return found

    def chunks(self, context: int) -> Sequence[int]:
        """Sizes of chunks that come into question."""
        if self.prefill_chunk:
            return [whole_stripes(self.prefill_chunk, context)]
        if self.target.platform == "cpu":
            return [whole_stripes(512, context)]
        return [whole_stripes(chunk, context) for chunk in _CHUNKS]

    def reasons(self, best: Layout, length: int) -> Iterable[str]:
        """Why a layout was chosen, against what it was chosen from."""
        if not self.fits(best, length):
            yield f"it comes nearest to holding {length:,} tokens, which none does"
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
        if self.razor:
            parts = best.compression.parts(length)
            sizes = sorted({spec.slots for p in parts for _, spec in p.windows})
            yield (
                f"{best.compression.kept(length)} KV heads of "
                f"{self.config.num_layers * self.config.num_kv_heads} keep everything"
                + ("" if self.razor.heads else ", spread evenly as far as is known")
                + ("; the others keep " if sizes else "")
                + " to ".join(f"{size:,}" for size in dict.fromkeys([*sizes[:1], *sizes[-1:]]))
                + (" tokens" if sizes else "")
            )
        if best.mesh[1] > 1:
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
    """Powers of two around what fits, and the longest."""
    powers = [2**i for i in range(13, 23) if longest / 32 <= 2**i <= min(2 * longest, bound)]
    return [*powers, longest] if longest else powers


def _as_flags(layout: Layout) -> dict[str, Any]:
    return {
        "mesh": layout.mesh_text,
        "dtype": layout.dtype,
        "kv_cache_dtype": layout.kv_cache_dtype,
        "kv_compression": layout.compression and dataclasses.asdict(layout.compression.razor),
        "prefill_chunk": layout.prefill_chunk,
        "max_batch_size": layout.batch,
        "max_output_length": layout.output_length,
    }


def _with_totals(programs: Mapping[str, Needs], target: Target) -> dict[str, dict[str, int]]:
    return {
        name: dataclasses.asdict(n) | {"total": n.total, "capacity": target.memory}
        for name, n in programs.items()
    }
