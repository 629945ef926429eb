"""Bytes that a compiled decode step moves between a device's memory and its cores.

They are counted from the text of the optimized program. An operand that lies in the device's memory
is read whole, unless only a slice of it is used, be it within a fusion. An array that is updated in
place is not read, and only the update is written. A loop's body runs as often as its condition
says. Pallas kernels are counted by the caller: the program does not say what they read.
"""

import collections
import dataclasses
import re
from collections.abc import Callable

from helpers.hlo import Computation, Instruction, Module, parse

# What moves nothing, or ends what another instruction began.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier"),
}
_ASSEMBLED = 'custom_call_target="ConcatBitcast"'  # slices that lie side by side, on a TPU
_SLICES = ("slice", "dynamic-slice", "gather", "slice-start")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is the update
_MOVES = {
    *("bitcast", "bitcast-convert", "reshape", "transpose", "copy", "convert", "broadcast"),
    *("pad", "concatenate", "reverse", "tuple", "get-tuple-element"),
}
_PALLAS = re.compile(r'custom_call_target="(__gpu\$xla\.gpu\.triton|tpu_custom_call)"')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device reads from its memory and writes to it."""

    read: float = 0.0
    written: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.read + other.read, self.written + other.written)

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.read * times, self.written * times)


# Counts a kernel, from its call and the instructions that make its operands.
Kernel = Callable[[Instruction, list[Instruction]], Traffic]


def decode_traffic(
    text: str, kernel: Kernel, segment: int, taken: float = 1.0
) -> dict[str, Traffic]:
    """Counts the traffic of one step of a compiled decode program.

    Args:
      text: the optimized program, which has one loop, over the steps of a segment.
      kernel: counts Pallas kernels.
      segment: number of steps, by which what is outside of the loop is divided.
      taken: how often, from 0 to 1, a conditional takes the branch that reads more.

    Returns:
      Traffic of each instruction that has any, the one that reads most first.
    """
    module = parse(text)
    (loop,) = (x for x in module.entry if x.op == "while")
    count = _Count(module, kernel, taken)
    found = {
        f"{x.op} {x.name}, once a segment": count.of(module.entry, x) * (1 / segment)
        for x in module.entry
        if x is not loop
    }
    for which in ("condition", "body"):
        computation = module[loop.attribute(which)[0]]
        held = _carried(computation)
        found |= {f"{x.op} {x.name}": count.of(computation, x, held) for x in computation}
    found = {name: x for name, x in found.items() if x.read or x.written}
    return dict(sorted(found.items(), key=lambda item: -item[1].read))


def total(found: dict[str, Traffic]) -> Traffic:
    return sum(found.values(), Traffic())


def _carried(body: Computation) -> frozenset[str]:
    """Returns the arrays that come into a loop.

    A core may hold those of a few layers throughout. Those of a whole model do not fit, so they
    count as read from memory.
    """
    (state,) = body.parameters
    return frozenset(x.name for x in body if x.operands == (state.name,))


class _Count:
    def __init__(self, module: Module, kernel: Kernel, taken: float):
        self._module, self._kernel, self._taken = module, kernel, taken

    def of(
        self, computation: Computation, x: Instruction, in_memory: frozenset[str] = frozenset()
    ) -> Traffic:
        """Counts an instruction that runs by itself; arrays named `in_memory` are read from it."""
        if x.op in _FREE or x.op.endswith("-done") or _ASSEMBLED in x.rest:
            return Traffic()
        if x.op == "while":
            parts = map(self._whole, x.attribute("condition") + x.attribute("body"))
            return sum(parts, Traffic()) * self._trips(x)
        if x.op == "conditional":
            return self._branches(x)
        if x.op in ("call", "async-start"):
            parts = map(self._whole, x.attribute("to_apply") + x.attribute("calls"))
            return sum(parts, Traffic())
        operands = [computation[name] for name in x.operands]
        if _PALLAS.search(x.rest):
            return self._kernel(x, operands)
        read = 0.0
        for y, used in zip(operands, self._used(computation, x), strict=True):
            held = computation.source(y).name in in_memory
            shares = [a.nbytes for a in y.arrays if held or a.in_device_memory]
            read += sum(shares) * used / max(y.size, 1)
        return Traffic(read, self._written(computation, x))

    def _whole(self, name: str) -> Traffic:
        computation = self._module[name]
        return sum((self.of(computation, x) for x in computation), Traffic())

    def _branches(self, x: Instruction) -> Traffic:
        kinds = ("true_computation", "false_computation", "branch_computations")
        names = (name for kind in kinds for name in x.attribute(kind))
        less, more = sorted(map(self._whole, names), key=lambda traffic: traffic.read)
        return less * (1 - self._taken) + more * self._taken

    def _trips(self, x: Instruction) -> int:
        """Returns how often a loop runs, which counts from 0 if it does not say how often."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', x.rest):
            return int(known[1])
        condition = self._module[x.attribute("condition")[0]]
        root = condition.root
        bound = condition[root.operands[-1]]
        if root.op != "compare" or "direction=LT" not in root.rest or bound.op != "constant":
            raise ValueError(f"the program does not say how often %{x.name} runs")
        return int(bound.arguments)

    def _used(self, computation: Computation, x: Instruction) -> list[float]:
        """Returns how many entries of each operand an instruction uses."""
        used = x.arrays[1].size if x.op == "slice-start" else x.size
        if x.op == "fusion":
            return self._used_parameters(self._fused(x), used)
        return _used(x, used, [computation[name].size for name in x.operands], x.op in _UPDATES)

    def _used_parameters(self, fused: Computation, of_root: float) -> list[float]:
        """Returns how many entries of each parameter make some entries of a fusion's result."""
        used, updates = collections.Counter({fused.root.name: of_root}), _updates(fused)
        for x in reversed(list(fused)):
            entries = used[x.name]
            if x.op == "fusion":
                uses = self._used_parameters(self._fused(x), entries)
            else:
                sizes = [fused[name].size for name in x.operands]
                uses = _used(x, entries, sizes, x.name in updates)
            for name, entries in zip(x.operands, uses, strict=True):
                used[name] = min(used[name] + entries, fused[name].size)
        return [used[x.name] for x in fused.parameters]

    def _written(self, computation: Computation, x: Instruction) -> float:
        if x.op == "fusion":
            fused = self._fused(x)
            updates = _updates(fused)
            pairs = zip(x.arrays, (fused.source(y) for y in _outputs(fused)), strict=True)
            of_arrays = [
                fused[y.operands[_UPDATES[y.op]]].nbytes if y.name in updates else array.nbytes
                for array, y in pairs
                if array.in_device_memory
            ]
            return sum(of_arrays)
        if x.op in _UPDATES:
            update = computation[x.operands[_UPDATES[x.op]]]
            return update.nbytes if x.arrays[0].in_device_memory else 0.0
        arrays = x.arrays
        if x.op.endswith("-start"):  # which also lists its operand
            arrays = x.arrays[:1] if x.op == "copy-start" else x.arrays[1:2]
        return sum(a.nbytes for a in arrays if a.in_device_memory)

    def _fused(self, x: Instruction) -> Computation:
        return self._module[x.attribute("calls")[0]]


def _outputs(fused: Computation) -> list[Instruction]:
    """Returns the instruction that makes each array that a fusion gives."""
    root = fused.root
    if root.op == "tuple":
        return [fused[name] for name in root.operands]
    return [root] * len(root.arrays)


def _updates(fused: Computation) -> set[str]:
    """Returns the instructions of a fusion that update one of its operands in place."""
    found = (fused.source(x) for x in _outputs(fused))
    return {
        x.name
        for x in found
        if x.op in _UPDATES and fused.source(fused[x.operands[0]]).op == "parameter"
    }


def _used(x: Instruction, used: float, sizes: list[float], in_place: bool) -> list[float]:
    """Returns how many entries of operands, of some sizes, make `used` entries of a result."""
    if x.op in _SLICES:
        return [min(used, sizes[0]), *sizes[1:]]
    if x.op in _UPDATES:
        return [0.0 if in_place else min(used, sizes[0]), *sizes[1:]]
    if x.op == "reduce":
        return [size * used / max(x.size, 1) for size in sizes]
    if x.op in _MOVES or (x.op not in ("custom-call", "sort") and set(sizes) <= {1, x.size}):
        return [min(used, size) for size in sizes]
    return sizes
