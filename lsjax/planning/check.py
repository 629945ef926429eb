"""Checks, before any weight is read, that a request fits the local devices."""

import dataclasses
from collections.abc import Iterator

from lsjax.cache import CACHE_DTYPES
from lsjax.distributed.sequence_layout import round_up_to_blocks
from lsjax.distributed.sharding import AXES, abstract_mesh
from lsjax.inference.engine_config import EngineConfig
from lsjax.inference.options import Options
from lsjax.inference.request import Request, caches_held
from lsjax.planning.arithmetic import needs_of
from lsjax.planning.deployment import Deployment
from lsjax.planning.planner import longest_served, longest_that_fits
from lsjax.planning.result import fits
from lsjax.planning.targets import Target, find_target
from lsjax.runtime.errors import UserError
from lsjax.runtime.memory import device_memory_bytes, human_bytes


def check_memory(options: Options, request: Request, document_length: int = 0) -> None:
    """Refuses a request that the local devices cannot hold, by arithmetic.

    Args:
      options: options of the model.
      request: the request, without the document.
      document_length: tokens of a document that all prompts begin with; 0 for none.

    Raises:
      UserError: the request does not fit; the message gives the memory needed, the memory
        available, and settings that would fit.
    """
    target, config = local_target(options), options.config
    batch = len(request.prompts) * caches_held(request.num_samples)
    deployment = _layout(options, batch, request.output_capacity, document_length)
    length = request.prompt_capacity
    programs = needs_of(config, target.platform, deployment, length)
    if fits(target, programs):
        return
    most = max(programs.values(), key=lambda needs: needs.total)
    longest = longest_that_fits(config, target, deployment, length)
    ways = list(_that_fit(options, deployment, target, length))
    if longest:
        ways.insert(0, f"prompts of at most {longest:,} tokens")
    out = f"these would fit: {'; or '.join(ways)}" if ways else "no setting makes it fit"
    document = f"a document of {document_length:,} tokens, " if document_length else ""
    raise UserError(
        f"{document}{length:,} tokens of prompt and {request.max_output_length:,} of output, "
        f"{deployment.batch} together, need {human_bytes(most.total)} of each device (weights "
        f"{human_bytes(most.weights)}, cache {human_bytes(most.cache)}, the rest "
        f"{human_bytes(most.temporaries)}), but each has {human_bytes(target.memory)}; {out}."
    )


def longest_here(
    options: Options, batch: int, output_length: int, allow_untrained_length: bool
) -> int:
    """Returns the longest prompt that the model serves and the local devices hold; 0 if none."""
    target = local_target(options)
    # The arithmetic is approximate, and other programs need memory, too.
    target = dataclasses.replace(target, memory=int(0.95 * target.memory))
    data = options.mesh.shape["data"]
    deployment = _layout(options, -(-batch // data) * data, output_length)
    bound = longest_served(
        options.config, output_length, allow_untrained_length, options.compression
    )
    return longest_that_fits(options.config, target, deployment, bound)


def local_target(options: Options) -> Target:
    """Returns the local devices as a target, each with the memory that this mesh leaves it."""
    memory = device_memory_bytes(options.mesh.size)
    return dataclasses.replace(find_target("here"), memory=memory)


def _layout(
    options: Options, batch: int, output_length: int, document_length: int = 0
) -> Deployment:
    settings = {f.name: getattr(options, f.name) for f in dataclasses.fields(EngineConfig)}
    settings["mesh"] = abstract_mesh(tuple(options.mesh.shape[axis] for axis in AXES))
    return Deployment(
        **settings, batch=batch, output_length=output_length, document_length=document_length
    )


def _that_fit(
    options: Options, deployment: Deployment, target: Target, length: int
) -> Iterator[str]:
    """Yields changes of flags that would each make the request fit."""
    context = options.mesh.shape["context"]
    less = CACHE_DTYPES[CACHE_DTYPES.index(deployment.kv_cache_dtype) + 1 :]
    others = [(f"--kv_cache_dtype {d}", {"kv_cache_dtype": d}) for d in less]
    if deployment.dtype == "float32":
        others.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    if deployment.weight_dtype == "auto":
        others.append(("--weight_dtype int8", {"weight_dtype": "int8"}))
    data = options.mesh.shape["data"]
    if deployment.batch > data:
        others.append((f"--max_batch_size {data}", {"batch": data}))
    smaller = round_up_to_blocks(max(1, deployment.prefill_chunk // 4), context)
    if smaller < deployment.prefill_chunk:
        others.append((f"--prefill_chunk {smaller}", {"prefill_chunk": smaller}))
    if options.mesh.size < target.devices:
        all_of_them = abstract_mesh((1, target.devices, 1))
        others.append((f"--mesh context={target.devices}", {"mesh": all_of_them}))
    for flags, changes in others:
        try_this = dataclasses.replace(deployment, **changes)
        if fits(target, needs_of(options.config, target.platform, try_this, length)):
            yield flags
