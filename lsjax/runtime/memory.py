"""Available memory, and peak memory use."""

import os
import resource
import sys

import jax


def peak_memory_bytes() -> int:
    """Returns peak memory use so far: of the fullest local device, or on CPU of the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_memory_bytes(count: int) -> int:
    """Returns the memory that programs can use per local device, if `count` devices are used.

    The CPU devices in use share the machine's memory.
    """
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices()]
    if None not in limits:
        return min(limits)
    return host_memory_bytes() // count


def host_memory_bytes() -> int:
    """Returns the machine's memory, or the container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(file, encoding="ascii") as f:
                total = min(total, int(f.read()))
        except (OSError, ValueError):  # no such file, or no limit
            continue
    return total


def human_bytes(n: float) -> str:
    """Formats a number of bytes: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} TiB"
