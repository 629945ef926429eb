"""Compiled programs, what compiling them cost, and the cache that spares it the next run."""

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
    """The cost of compiling so far, in this process.

    Attributes:
      seconds: spent tracing and compiling, or reading from the persistent cache.
      compilations: programs compiled, those read from the persistent cache not counted.
    """

    seconds: float = 0.0
    compilations: int = 0


CLOCK = CompileClock()


class Owner(Protocol):
    """What a program is compiled for, beside the shapes of its arguments.

    Attributes:
      platform: cpu, gpu (or cuda) or tpu.
      compiled: the owner's programs, which live as long as it does.
    """

    platform: str
    compiled: dict[Any, Callable]


class Program:
    """A function of (owner, params, ...) compiled once for each owner and set of argument shapes.

    The owner and keyword arguments are static. Parameters have the same shapes for all calls of an
    owner and are left out of the look-up. Arguments are counted without the owner.
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
        """The program for arguments that are shapes with shardings, on devices that may not be
        here, ready to be compiled; nothing is kept."""

        def function(*args: Any) -> Any:
            return self._function(owner, *args, **static)

        function.__name__ = self._function.__name__  # by which profiles know the program
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
