"""Bytes per device according to the compiler, from the programs that would run."""

import dataclasses
from typing import Any

from lsjax.config import ModelConfig
from lsjax.inference.engine import Engine
from lsjax.planning.arithmetic import hidden_bytes
from lsjax.planning.deployment import Deployment, MemoryUsage
from lsjax.planning.targets import Target, target_mesh


def compile_for(
    config: ModelConfig, target: Target, deployment: Deployment, input_length: int
) -> dict[str, MemoryUsage]:
    """Compiles prefill and decode for a target.

    Args:
      config: model configuration.
      target: devices to compile for.
      deployment: layout of the model on the devices.
      input_length: prompt length in tokens.

    Returns:
      The memory per device that "prefill" and "decode" need.

    Raises:
      TooLargeError: the compiler refused a program that does not fit the target's memory.
      UserError: the target's compiler is not installed, or the target has too few devices.
    """
    mesh = target_mesh(target, deployment.sizes)
    spec = deployment.cache_spec_for(input_length)
    engine = Engine(config, dataclasses.replace(deployment, mesh=mesh))
    try:
        prefill, decode = (p.memory_analysis() for p in engine.compile_ahead(spec))
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLargeError(str(error).partition("\n")[0]) from None
        raise
    # Decode takes all weights. Prefill does not take the LM head, which occupies memory all the
    # same. The cache is donated, so its size is that of the aliased outputs.
    weights = decode.argument_size_in_bytes - decode.alias_size_in_bytes

    def needs(program: Any) -> MemoryUsage:
        cache = program.alias_size_in_bytes
        out = program.output_size_in_bytes - cache
        return MemoryUsage(weights, cache, program.temp_size_in_bytes + out)

    if not engine.by_layer:
        return {"prefill": needs(prefill), "decode": needs(decode)}
    # Prefill runs a chunk through one layer, while memory also holds all weights, the compressed
    # cache, and all hidden states.
    one = needs(prefill)
    work = one.cache + one.temporaries + hidden_bytes(config, deployment, input_length)
    return {
        "prefill": MemoryUsage(weights, decode.alias_size_in_bytes, work),
        "decode": needs(decode),
    }


class TooLargeError(Exception):
    """Raised when the compiler refuses a program that does not fit the device's memory."""
