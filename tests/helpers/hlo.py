"""The text of a compiled program, read into computations and instructions."""

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)((?::[^}]*)?)\})?")
_OPENING, _CLOSING = "([{", ")]}"


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that an instruction makes.

    Attributes:
      dtype: as HLO writes it, s8 or bf16.
      shape: dimensions.
      layout: dimensions from the minor to the major one; empty for rows one after the other.
      tiled: what HLO says of the layout's tiles and of the memory.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: tuple[int, ...]
    tiled: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> float:
        """Bytes of an entry."""
        if self.dtype in ("pred", "token", "opaque"):
            return float(self.dtype == "pred")
        return int(re.search(r"\d+", self.dtype)[0]) / 8

    @property
    def nbytes(self) -> float:
        """Bytes in memory, where a TPU's tiles are whole."""
        shape = [self.shape[i] for i in reversed(self.layout)] or list(self.shape)
        if tile := re.search(r"T\(([\d,]+)\)", self.tiled):
            sizes = [int(n) for n in tile[1].split(",")]
            for i in range(1, min(len(sizes), len(shape)) + 1):
                shape[-i] = -(-shape[-i] // sizes[-i]) * sizes[-i]
        return math.prod(shape) * self.itemsize

    @property
    def in_device_memory(self) -> bool:
        """Whether it lies in the device's memory, and not in a core's."""
        return not re.search(r"S\([1-9]", self.tiled)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction; `arrays` are what it makes, and `rest` is all that follows its operands."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    rest: str
    is_root: bool

    @property
    def size(self) -> int:
        """Entries of all that it makes."""
        return sum(array.size for array in self.arrays)

    @property
    def nbytes(self) -> float:
        return sum(array.nbytes for array in self.arrays)

    def attribute(self, name: str) -> list[str]:
        """Names of the computations that an attribute lists."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @property
    def root(self) -> Instruction:
        return next(x for x in self if x.is_root)

    @property
    def parameters(self) -> list[Instruction]:
        found = (x for x in self if x.op == "parameter")
        return sorted(found, key=lambda x: int(x.arguments))

    def source(self, instruction: Instruction) -> Instruction:
        """What an instruction renames, which bitcast does."""
        while instruction.op == "bitcast":
            instruction = self[instruction.operands[0]]
        return instruction


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, and the one that runs."""

    computations: dict[str, Computation]
    entry: Computation

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = Computation({})
            computations[found[2]] = current
            entry = current if found[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.instructions[found[2]] = _instruction(found, line)
    return Module(computations, entry)


def _instruction(found: re.Match, line: str) -> Instruction:
    line = re.sub(r"/\*index=\d+\*/", "", line)
    made, after = _until_space(line[found.end() :])
    op, _, after = after.partition("(")
    arguments = after[: _closing(after)]
    return Instruction(
        name=found[2],
        op=op,
        arrays=tuple(map(_array, _ARRAY.finditer(made))),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)) if op != "constant" else (),
        arguments=arguments,
        rest=after[len(arguments) :],
        is_root=bool(found[1]),
    )


def _array(found: re.Match) -> Array:
    dtype, *lists, tiled = found.groups()
    shape, layout = (tuple(map(int, re.findall(r"\d+", x or ""))) for x in lists)
    return Array(dtype, shape, layout, tiled or "")


def _until_space(text: str) -> tuple[str, str]:
    """Cuts a text at the first space that is in no bracket."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter == " " and not depth:
            return text[:i], text[i + 1 :]
    raise ValueError(f"no instruction: {text[:80]}")


def _closing(text: str) -> int:
    """Finds the bracket that closes one opened before the text."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if not depth:
            return i
    raise ValueError(f"not closed: {text[:80]}")
