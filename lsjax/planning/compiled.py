"""Bytes a device, as the compiler says them of the very programs that would run."""

from typing import Any

from lsjax.config import ModelConfig
from lsjax.engine import Engine
from lsjax.planning.arithmetic import hidden_bytes
from lsjax.planning.layout import Layout
from lsjax.planning.needs import Needs
from lsjax.planning.targets import Target, target_mesh


def compile_for(
    config: ModelConfig, target: Target, layout: Layout, input_length: int
) -> dict[str, Needs]:
    """Compiles prefill and decode for a target.

    Returns:
      The needs of "prefill" and of "decode".

    Raises:
      TooLargeError: the compiler has refused, since the target's memory does not hold the program.
      UserError: the target's compiler is not installed, or the target has too few devices.
    """
    mesh = target_mesh(target, layout.sizes)
    spec = layout.cache_spec(input_length)
    settings = layout.dtype, layout.kv_cache_dtype, layout.prefill_chunk, layout.compression
    engine = Engine(config, mesh, *settings)
    try:
        prefill, decode = (p.memory_analysis() for p in engine.compile_ahead(spec, input_length))
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLargeError(str(error).partition("\n")[0]) from None
        raise
    # Decode takes all weights; prefill leaves the head alone, but it lies there. The cache is what
    # comes out where it went in.
    weights = decode.argument_size_in_bytes - decode.alias_size_in_bytes

    def needs(program: Any) -> Needs:
        cache = program.alias_size_in_bytes
        out = program.output_size_in_bytes - cache
        return Needs(weights, cache, program.temp_size_in_bytes + out)

    if not engine.by_layer:
        return {"prefill": needs(prefill), "decode": needs(decode)}
    # A chunk in one layer, beside all weights, what is compressed already, and all hidden states.
    one = needs(prefill)
    work = one.cache + one.temporaries + hidden_bytes(config, layout, input_length)
    return {
        "prefill": Needs(weights, decode.alias_size_in_bytes, work),
        "decode": needs(decode),
    }


class TooLargeError(Exception):
    """A compiler's refusal of a program that its device's memory does not hold."""
