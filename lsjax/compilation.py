"""Compiled programs, what compiling them cost, and the cache that spares it the next run."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax

_disk_hits = 0


def _count_disk_hits(event: str, **_: Any) -> None:
    global _disk_hits
    _disk_hits += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_count_disk_hits)


class CompileClock:
    """What compiling has cost so far.

    Attributes:
      seconds: spent tracing and compiling, or reading from the persistent cache.
      compilations: programs compiled, those read from the persistent cache not counted.
    """

    def __init__(self):
        self.seconds = 0.0
        self.compilations = 0


class Program:
    """A function compiled once for each set of argument shapes, its compile time accounted.

    The first argument (the parameters) never changes shape and is left out of the look-up.
    """

    def __init__(self, function: Callable, clock: CompileClock, **jit_options: Any):
        self._jitted = jax.jit(function, **jit_options)
        self._clock = clock
        self._compiled: dict[Any, Callable] = {}

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The program for arguments that are shapes with shardings, on devices that may not be
        here, ready to be compiled; nothing is kept."""
        return self._jitted.lower(*args)

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args[1:])
        key = structure, tuple((x.shape, x.dtype) for x in leaves)
        if key not in self._compiled:
            start, hits = time.perf_counter(), _disk_hits
            self._compiled[key] = self.lower(*args).compile()
            self._clock.seconds += time.perf_counter() - start
            self._clock.compilations += _disk_hits == hits
        return self._compiled[key](*args)


def compiler_options(platform: str) -> dict[str, Any]:
    """What XLA is told when it compiles for a platform.

    A CPU with vectors of 512 bits is to use them: LLVM takes half of each otherwise, and the
    exponentials of attention are a tenth to a sixth slower.

    A TPU is not to gather the weights of later layers while it runs earlier ones: it would hold
    three matrices of every layer at once, GiBs, to save a few percent of the time over a long text.
    The second option keeps the ring's blocks travelling during attention then.
    """
    if platform == "tpu":
        return {
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
            "xla_tpu_enable_all_experimental_scheduler_features": True,
        }
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else {}


def enable_persistent_cache() -> None:
    """Keeps compiled programs on disk, so that the same shapes never compile twice.

    In the folder that JAX_COMPILATION_CACHE_DIR names, else in ~/.cache/lsjax/compiled.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(
        os.path.expanduser("~"), ".cache", "lsjax", "compiled"
    )
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
