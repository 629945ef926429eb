"""Bytes per device according to the compiler, from the programs that would run."""

import concurrent.futures
import dataclasses
from typing import Any

from lsjax.config import ModelConfig
from lsjax.inference.engine import Engine
from lsjax.planning.arithmetic import cache_bytes, hidden_bytes, needs_of
from lsjax.planning.deployment import Deployment, MemoryUsage
from lsjax.planning.shared_document import document_specs, held_bytes, shared_bytes
from lsjax.planning.targets import Target, target_mesh

# With the compiler, the search ends once at most this share of the length is unused. A compilation
# takes a minute, so the first guess should be close.
_TIGHT = 0.04
_ROUNDS = 4


def compile_for(
    config: ModelConfig, target: Target, deployment: Deployment, input_length: int
) -> dict[str, MemoryUsage]:
    """Compiles prefill and decode for a target.

    Args:
      config: model configuration.
      target: devices to compile for.
      deployment: layout of the model on the devices.
      input_length: prompt length in tokens, without the document.

    Returns:
      The memory per device that "prefill" and "decode" need, and "read" of a document.

    Raises:
      TooLargeError: the compiler refused a program that does not fit the target's memory.
      UserError: the target's compiler is not installed, or the target has too few devices.
    """
    mesh = target_mesh(target, deployment.sizes)
    engine = Engine(config, dataclasses.replace(deployment, mesh=mesh))
    try:
        if deployment.document_length:
            return _with_document(engine, deployment, input_length)
        *prefill, decode = (
            p.memory_analysis()
            for p in engine.compile_ahead(deployment.cache_spec_for(input_length))
        )
    except Exception as error:
        # A kernel that needs too much shared memory is a fault of ours, whatever the length.
        if "RESOURCE_EXHAUSTED" in str(error) and "Shared memory" not in str(error):
            raise TooLargeError(str(error).partition("\n")[0]) from None
        raise
    # Decode takes all weights. Prefill does not take the LM head, which occupies memory all the
    # same. The cache is donated, so its size is that of the aliased outputs.
    weights = decode.argument_size_in_bytes - decode.alias_size_in_bytes
    found = [_needs(program, weights) for program in prefill]
    if engine.by_layer:
        hidden = hidden_bytes(config, deployment, input_length)
        found = [_by_layer(one, decode.alias_size_in_bytes, hidden) for one in found]
    return {"prefill": max(found, key=lambda n: n.total), "decode": _needs(decode, weights)}


def _by_layer(one: MemoryUsage, cache: int, hidden: int) -> MemoryUsage:
    """Returns what prefill layer by layer needs, from what a chunk needs in one layer.

    Memory also holds all weights, the compressed cache, and all hidden states.
    """
    return MemoryUsage(one.weights, cache, one.cache + one.temporaries + hidden)


def _needs(program: Any, weights: int, held: int = 0) -> MemoryUsage:
    """Returns what a program needs with `held` bytes of cache that it does not change."""
    cache = program.alias_size_in_bytes
    out = program.output_size_in_bytes - cache
    return MemoryUsage(weights, cache + held, program.temp_size_in_bytes + out)


def _with_document(
    engine: Engine, deployment: Deployment, input_length: int
) -> dict[str, MemoryUsage]:
    """Compiles the programs that read a document, and those of questions about it."""
    config, platform = engine.config, engine.decoder.mesh.devices.flat[0].platform
    specs = document_specs(config, deployment, input_length)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        *lowered, _ = engine.lower_ahead(specs.document)
        read = [pool.submit(program.compile) for program in lowered]
        prefill, decode = engine.compile_ahead(specs.own, specs.document)
        prefill, decode, *read = (
            p.memory_analysis() for p in (prefill, decode, *(x.result() for x in read))
        )
    held = held_bytes(config, platform, deployment)
    weights = decode.argument_size_in_bytes - decode.alias_size_in_bytes
    shared = shared_bytes(config, platform, deployment)
    weights -= shared
    reading = [_needs(program, weights) for program in read]
    if engine.by_layer:
        alone = dataclasses.replace(deployment, batch=deployment.sizes["data"])
        hidden = hidden_bytes(config, alone, alone.document_length)
        reading = [_by_layer(one, shared, hidden) for one in reading]
    return {
        "read": max(reading, key=lambda n: n.total),
        "prefill": _needs(prefill, weights, held),
        "decode": _needs(decode, weights, held),
    }


class TooLargeError(Exception):
    """Raised when the compiler refuses a program that does not fit the device's memory."""


def ask_compiler(
    config: ModelConfig,
    target: Target,
    deployment: Deployment,
    length: int | None,
    longest: int,
    bound: int,
) -> tuple[dict[str, MemoryUsage], int]:
    """Returns the memory needed according to the compiler, and the longest prompt that fits.

    Args:
      config: model configuration.
      target: devices to plan for.
      deployment: layout of the model on the devices.
      length: prompt length to report the memory of; None for the longest.
      longest: longest prompt by arithmetic, from which the search starts.
      bound: upper bound on the longest prompt.
    """

    def ask(n: int) -> dict[str, MemoryUsage] | None:
        try:
            return compile_for(config, target, deployment, n)
        except TooLargeError:
            return None

    guess = max(longest if longest == bound else int(longest * (1 - _TIGHT / 2)), 1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        wanted = sorted({length or guess, guess})
        answers = dict(zip(wanted, pool.map(ask, wanted), strict=True))
    far = guess + 2**20
    sizes = [cache_bytes(config, target.platform, deployment, n) for n in (guess, far)]
    step = max((sizes[1] - sizes[0]) / (far - guess), 1.0)  # bytes per token
    best = 0
    for _ in range(_ROUNDS):
        if guess not in answers:
            answers[guess] = ask(guess)
        found = answers[guess]
        if found is None:  # the compiler refused and does not say by how much
            guess = max(1, int(guess * (1 - _TIGHT)))
            continue
        room = (target.memory - max(n.total for n in found.values())) / step
        if room >= 0:
            best = max(best, guess)
        if 0 <= room <= _TIGHT * guess or (room >= 0 and guess == bound):
            break
        guess = min(bound, max(1, int(guess + room - _TIGHT / 2 * guess)))
    length = length or best or guess
    return answers[length] or needs_of(config, target.platform, deployment, length), best
