"""Before a weight is read: will what was asked for fit the devices that are here?"""

import dataclasses
from collections.abc import Iterator

from lsjax.cache import CACHE_DTYPES, whole_stripes
from lsjax.errors import UserError
from lsjax.memory import device_memory_bytes
from lsjax.planning.arithmetic import needs_of
from lsjax.planning.layout import Layout
from lsjax.planning.planner import fits, longest_served, longest_that_fits
from lsjax.planning.targets import Target, find_target
from lsjax.report import human_bytes
from lsjax.requests import Request, caches_held
from lsjax.settings import Settings
from lsjax.sharding import AXES


def check_memory(settings: Settings, request: Request) -> None:
    """Refuses what the devices that are here cannot hold, by arithmetic.

    Raises:
      UserError: with what is needed, what there is, and what would fit.
    """
    target, config = _here(settings), settings.config
    batch = len(request.prompts) * caches_held(request.num_samples)
    layout = _layout(settings, batch, request.output_room)
    length = request.input_room
    programs = needs_of(config, target.platform, layout, length)
    if fits(target, programs):
        return
    most = max(programs.values(), key=lambda needs: needs.total)
    longest = longest_that_fits(config, target, layout, length)
    ways = list(_that_fit(settings, layout, target, length))
    if longest:
        ways.insert(0, f"prompts of at most {longest:,} tokens")
    out = f"these would fit: {'; or '.join(ways)}" if ways else "no setting makes it fit"
    raise UserError(
        f"{length:,} tokens of prompt and {request.max_output_length:,} of output, "
        f"{layout.batch} together, need {human_bytes(most.total)} of each device (weights "
        f"{human_bytes(most.weights)}, cache {human_bytes(most.cache)}, the rest "
        f"{human_bytes(most.temporaries)}), but each has {human_bytes(target.memory)}; {out}."
    )


def longest_here(
    settings: Settings, batch: int, output_length: int, allow_untrained_length: bool
) -> int:
    """The longest prompt that the model serves and the devices that are here hold; 0 for none."""
    target = _here(settings)
    # Arithmetic is not exact, and other programs want memory, too.
    target = dataclasses.replace(target, memory=int(0.95 * target.memory))
    data = settings.mesh.shape["data"]
    layout = _layout(settings, -(-batch // data) * data, output_length)
    bound = longest_served(settings.config, output_length, allow_untrained_length)
    return longest_that_fits(settings.config, target, layout, bound)


def _here(settings: Settings) -> Target:
    """The devices that are here, with the memory of those that the mesh takes."""
    memory = device_memory_bytes(settings.mesh.size)
    return dataclasses.replace(find_target("here"), memory=memory)


def _layout(settings: Settings, batch: int, output_length: int) -> Layout:
    return Layout(
        tuple(settings.mesh.shape[axis] for axis in AXES),
        settings.dtype,
        settings.kv_cache_dtype,
        settings.prefill_chunk,
        batch,
        output_length,
        settings.compression,
    )


def _that_fit(settings: Settings, layout: Layout, target: Target, length: int) -> Iterator[str]:
    """Flags that would make it fit, each by itself."""
    context = settings.mesh.shape["context"]
    less = CACHE_DTYPES[CACHE_DTYPES.index(layout.kv_cache_dtype) + 1 :]
    others = [(f"--kv_cache_dtype {d}", {"kv_cache_dtype": d}) for d in less]
    if layout.dtype == "float32":
        others.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    data = settings.mesh.shape["data"]
    if layout.batch > data:
        others.append((f"--max_batch_size {data}", {"batch": data}))
    smaller = whole_stripes(max(1, layout.prefill_chunk // 4), context)
    if smaller < layout.prefill_chunk:
        others.append((f"--prefill_chunk {smaller}", {"prefill_chunk": smaller}))
    if settings.mesh.size < target.devices:
        all_of_them = (1, target.devices, 1)
        others.append((f"--mesh context={target.devices}", {"mesh": all_of_them}))
    for flags, changes in others:
        try_this = dataclasses.replace(layout, **changes)
        if fits(target, needs_of(settings.config, target.platform, try_this, length)):
            yield flags
