"""Groups of layers that repeat, which one scan runs."""

from collections.abc import Hashable, Sequence

Group = tuple[int, ...]  # indices of consecutive layers


def repeated_groups(kinds: Sequence[Hashable]) -> list[list[Group]]:
    """Splits layers into runs of groups that are alike, layer by layer.

    From a run's first layer on, the groups are those that cover most layers by repeating.

    Args:
      kinds: kind of each layer.

    Returns:
      The runs, in order, of which each has one group or more: for three recurrences and a layer of
      attention, eight times over, a single run of eight groups.
    """
    kinds, first, runs = tuple(kinds), 0, []
    while first < len(kinds):
        size, times = 1, 1
        for candidate in range(1, (len(kinds) - first) // 2 + 1):
            repeats = _repeats(kinds[first:], candidate)
            if repeats > 1 and candidate * repeats > size * times:
                size, times = candidate, repeats
        stop = first + size * times
        runs.append([tuple(range(i, i + size)) for i in range(first, stop, size)])
        first = stop
    return runs


def _repeats(kinds: tuple, size: int) -> int:
    """Returns how many times the first `size` kinds stand there in a row."""
    times = 1
    while kinds[times * size : (times + 1) * size] == kinds[:size]:
        times += 1
    return times
