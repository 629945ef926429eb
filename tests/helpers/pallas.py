"""Bytes that Pallas kernels of a decode step read and write, by their grids and block specs."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src.core import Literal, jaxprs_in_params

from helpers.hlo import Instruction
from helpers.traffic import Traffic
from lsjax.cache import CacheSpec
from lsjax.inference.engine import Engine
from lsjax.runtime.compilation import Program

_HLO_KINDS = {"i": "s", "u": "u", "f": "f"}


def traced_decode(engine: Engine, spec: CacheSpec) -> jax.stages.Traced:
    """Traces the decode program that engine.lower_ahead lowers."""

    def trace(self: Program, model: Any, *args: Any, **static: Any) -> jax.stages.Traced:
        return self._on(model.platform).trace(model, *args, **static)

    with mock.patch.object(Program, "lower", trace):
        return engine.lower_ahead(spec)[-1]


class Kernels:
    """The kernels of a traced program; see traffic.Kernel for what a call counts.

    Args:
      traced: the program.
      visible: number of slots that a step attends to, the first ones, by the number of slots that
        keys have on a device. Rows of other arrays are all visible.
    """

    def __init__(self, traced: jax.stages.Traced, visible: Mapping[int, int]):
        self._kernels = {_signature(x): x for x in _kernels_of(traced.jaxpr.jaxpr)}
        self._visible = visible

    def __call__(self, call: Instruction, operands: list[Instruction]) -> Traffic:
        arrays = [array for x in operands for array in x.arrays]
        kernel = self._kernels[tuple((x.dtype, x.shape) for x in arrays)]
        blocks = _blocks_of(kernel, self._visible)
        if "tpu_custom_call" in call.rest:
            read = map(blocks.fetched, blocks.inputs)
        else:
            read = _loaded(kernel, blocks, self._visible)
        from_memory = (x.in_device_memory for x in arrays[-len(blocks.inputs) :])
        written = sum(map(blocks.fetched, blocks.outputs))
        return Traffic(sum(itertools.compress(read, from_memory)), written)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The blocks of a kernel's inputs, and of those outputs that are no inputs.

    Attributes:
      grid: the kernel's grid.
      scalars: what index maps are given beside a step of the grid.
      inputs, outputs: Pallas' block mappings.
    """

    grid: tuple[int, ...]
    scalars: tuple[np.ndarray, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]

    def at(self, block: Any) -> list[tuple[int, ...]]:
        """Returns where the block of each step of the grid begins."""
        steps = itertools.product(*map(range, self.grid))
        return [
            tuple(int(i) for i in block.compute_start_indices_interpret(step, *self.scalars))
            for step in steps
        ]

    def fetched(self, block: Any) -> int:
        """Returns the bytes of the blocks that are not those of the step before."""
        at = self.at(block)
        return _nbytes(block) * sum(x != y for x, y in zip(at, [None, *at[:-1]], strict=True))


def _blocks_of(kernel: Any, visible: Mapping[int, int]) -> _Blocks:
    mapping = kernel.params["grid_mapping"]
    aliased = {output for _, output in kernel.params["input_output_aliases"]}
    inputs = mapping.block_mappings[: mapping.num_inputs]
    outputs = mapping.block_mappings[mapping.num_inputs :]
    grid, scalars = mapping.grid, ()
    if mapping.num_index_operands:
        # Attention on a TPU is told the first block of keys, one past the last, which is also what
        # the grid ends with, and two numbers that index maps do not look at.
        slots, size = next(
            (x.array_aval.shape[2], x.block_aval.shape[1])
            for x in inputs
            if len(x.array_aval.shape) == 4 and x.array_aval.shape[2] in visible
        )
        stop = -(-visible[slots] // size)
        scalars = tuple(np.full((1, 1), n, np.int32) for n in (0, stop, 0, 0))
        grid = (*grid[:-1], stop)
    return _Blocks(grid, scalars, inputs, [x for i, x in enumerate(outputs) if i not in aliased])


def _nbytes(block: Any) -> int:
    return math.prod(block.block_aval.shape) * block.block_aval.dtype.itemsize


def _loaded(kernel: Any, blocks: _Blocks, visible: Mapping[int, int]) -> Iterator[int]:
    """Counts what a kernel compiled by Triton loads of each input.

    A load by itself is done by every program, and reaches no further than the program's block.
    Programs that have the same block share a loop over its rows among them, up to the last visible
    one and to the end of what is loaded together.
    """
    body = kernel.params["jaxpr"]
    loads = list(_loads(body, body.invars))
    for ref, block in zip(body.invars, blocks.inputs, strict=False):
        alone = sum(size for x, size, _, in_loop in loads if x is ref and not in_loop)
        read = math.prod(blocks.grid) * min(alone, _nbytes(block))
        together = [rows for x, _, rows, in_loop in loads if x is ref and in_loop]
        if together:
            slots = block.block_aval.shape[0]
            rows = -(-visible.get(slots, slots) // max(together)) * max(together)
            read += len(set(blocks.at(block))) * _nbytes(block) * min(rows, slots) // slots
        yield read


def _loads(body: Any, refs: list[Any], in_loop: bool = False) -> Iterator[tuple]:
    """Finds each load: the ref, the bytes, the rows, and whether a loop does it."""
    names = dict(zip(body.invars, refs, strict=True))
    for x in body.eqns:
        operands = [None if isinstance(v, Literal) else names.get(v) for v in x.invars]
        if x.primitive.name in ("masked_load", "get"):
            loaded = x.outvars[0].aval
            rows = loaded.shape[0] if loaded.shape else 1
            yield operands[0], loaded.size * loaded.dtype.itemsize, rows, in_loop
        elif x.primitive.name == "while":
            operands = operands[x.params["cond_nconsts"] :]
            yield from _loads(x.params["body_jaxpr"].jaxpr, operands, in_loop=True)
        else:
            is_loop = in_loop or x.primitive.name == "scan"
            for inner in jaxprs_in_params(x.params):
                yield from _loads(inner, operands, is_loop)


def _kernels_of(program: Any) -> Iterator[Any]:
    for x in program.eqns:
        if x.primitive.name == "pallas_call":
            yield x
        else:
            for inner in jaxprs_in_params(x.params):
                yield from _kernels_of(inner)


def _signature(kernel: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns the dtypes and shapes of a kernel's operands as HLO writes them."""
    return tuple((_hlo_name(x.aval.dtype), x.aval.shape) for x in kernel.invars)


def _hlo_name(dtype: np.dtype) -> str:
    if dtype.name in ("bfloat16", "bool"):
        return {"bfloat16": "bf16", "bool": "pred"}[dtype.name]
    return f"{_HLO_KINDS[dtype.kind]}{8 * dtype.itemsize}"
