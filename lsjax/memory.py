"""How much memory there is, and how much has been used."""

import os
import resource
import sys

import jax


def peak_memory_bytes() -> int:
    """The most bytes held so far: by the fullest local device, on CPU by the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_memory_bytes(count: int) -> int:
    """What programs can have of each of `count` devices that are here.

    CPU devices share the machine's memory, those of them that are used.
    """
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices()]
    if None not in limits:
        return min(limits)
    return host_memory_bytes() // count


def host_memory_bytes() -> int:
    """The machine's memory, or what a container leaves of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(file, encoding="ascii") as f:
                total = min(total, int(f.read()))
        except (OSError, ValueError):  # another kind of machine, or no limit
            continue
    return total
