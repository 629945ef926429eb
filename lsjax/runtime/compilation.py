"""Compiled programs, the time spent compiling them, and the persistent compilation cache."""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax

_disk_hits = 0


def _count_disk_hits(event: str, **_: Any) -> None:
    global _disk_hits
    _disk_hits += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_count_disk_hits)


@dataclasses.dataclass
class CompileClock:
    """The cost of compiling in this process so far.

    Attributes:
      seconds: time spent tracing and compiling, or reading from the persistent cache.
      compilations: number of programs compiled, without those read from the persistent cache.
    """

    seconds: float = 0.0
    compilations: int = 0


CLOCK = CompileClock()


class Owner(Protocol):
    """An object that programs are compiled for, and that keeps them.

    Attributes:
      platform: cpu, gpu (or cuda) or tpu.
      compiled: compiled programs, which live as long as the owner does.
    """

    platform: str
    compiled: dict[Any, Callable]


class Program:
    """A function of (owner, params, ...) that is compiled once per owner and argument shapes.

    The owner and keyword arguments are static. Params have the same shapes in all calls with an
    owner, so the lookup of compiled programs ignores them. `donate_argnums` counts arguments
    without the owner.
    """

    def __init__(
        self,
        function: Callable,
        out_shardings: Callable[[Any], Any] | None = None,
        donate_argnums: int | tuple[int, ...] = (),
    ):
        self._function, self._out_shardings = function, out_shardings
        self._donate_argnums = donate_argnums

    def lower(self, owner: Owner, *args: Any, **static: Any) -> jax.stages.Lowered:
        """Lowers the program, so that it can be compiled; the result is not kept.

        Arguments may be shapes with shardings, on devices that need not be present.
        """

        def function(*args: Any) -> Any:
            return self._function(owner, *args, **static)

        function.__name__ = self._function.__name__  # the name of the program in profiles
        options = {}
        if self._out_shardings is not None:
            options["out_shardings"] = self._out_shardings(owner)
        return jax.jit(
            function,
            donate_argnums=self._donate_argnums,
            compiler_options=compiler_options(owner.platform),
            **options,
        ).lower(*args)

    def __call__(self, owner: Owner, *args: Any, **static: Any) -> Any:
        leaves, structure = jax.tree.flatten(args[1:])
        shapes = tuple((x.shape, x.dtype) for x in leaves)
        key = self, tuple(static.items()), structure, shapes
        if key not in owner.compiled:
            start, hits = time.perf_counter(), _disk_hits
            owner.compiled[key] = self.lower(owner, *args, **static).compile()
            CLOCK.seconds += time.perf_counter() - start
            CLOCK.compilations += _disk_hits == hits
        return owner.compiled[key](*args)


def compiler_options(platform: str) -> dict[str, Any]:
    """Returns the XLA compiler options for a platform.

    CPUs with 512-bit vectors should use them. By default LLVM uses only half of each, and the
    exponentials of attention are a tenth to a sixth slower.

    TPUs should not gather the weights of later layers while they run earlier ones. That would hold
    three matrices of every layer at once, which is GiBs, to save a few percent of the time of a
    long text. The second option keeps the ring's transfers overlapped with attention in that case.
    """
    if platform == "tpu":
        return {
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
            "xla_tpu_enable_all_experimental_scheduler_features": True,
        }
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else {}


def enable_persistent_cache() -> None:
    """Keeps compiled programs on disk, so that the same shapes never compile twice.

    The folder is JAX_COMPILATION_CACHE_DIR if that is set, else ~/.cache/lsjax/compiled.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(
        os.path.expanduser("~"), ".cache", "lsjax", "compiled"
    )
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
