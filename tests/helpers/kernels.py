"""Kernels of a program compiled for a GPU, counted from its text."""

import re

# What launches no kernel.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)")


def between_calls(text: str, name: str) -> tuple[list[str], list[str]]:
    """Finds the kernels from the first call of kernel `name` to the next one.

    One of them is in each layer of a decode step, so that these are the kernels of one layer.

    Args:
      text: a compiled program of two layers.
      name: name of a Pallas kernel.

    Returns:
      The kernels in the order of launch, with the last call and without the first; and those of the
      longest chain in which each waits for the one before.
    """
    for body in re.split(r"\n}\n", text):
        if body.count(f"/{name}/pallas_call") < 2 or "custom-call(" not in body:
            continue
        found = [_INSTRUCTION.match(line) for line in body.splitlines()]
        lines = [(m[1], m[2], m[3]) for m in found if m]
        calls = [x for x, op, rest in lines if op == "custom-call" and f"/{name}/" in rest]
        if len(calls) >= 2:
            return _between(lines, *calls[:2])
    raise ValueError(f"no computation calls {name} twice")


def _between(
    lines: list[tuple[str, str, str]], first: str, last: str
) -> tuple[list[str], list[str]]:
    chains, launched, begun = {first: []}, [], False
    for x, op, rest in lines:
        begun = begun or x == first
        if not begun or x == first:
            continue
        operands = re.findall(r"%[\w.\-]+", rest.partition("), ")[0])
        chain = max((chains[y] for y in operands if y in chains), key=len, default=None)
        if op not in _FREE:
            launched.append(f"{x} {op}")
            chain = None if chain is None else [*chain, f"{x} {op}"]
        if chain is not None:
            chains[x] = chain
        if x == last:
            return launched, chains[last]
    raise ValueError(f"{last} does not come after {first}")
