"""Compiled programs, the time spent compiling them, and the persistent compilation cache."""

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass
class CompileClock:
    """The cost of compiling in this process so far.

    Attributes:
      seconds: time spent tracing and compiling, or reading from the persistent cache.
      compilations: number of Programs compiled, without those read from the persistent cache.
    """

    seconds: float = 0.0
    compilations: int = 0


CLOCK = CompileClock()
_DURATIONS = "/jax/core/compile/"
_programs: dict[str, "Program"] = {}  # by the name of their function, as JAX reports it
_read_from_disk = threading.local()


class Program:
    """A function of (model, ...), compiled once for each model and shapes of its arguments.

    The model is static, and so are the arguments named in `static_argnames`. The compiler's options
    depend on the platform that the model says it runs on.
    """

    def __init__(
        self,
        function: Callable,
        donate_argnames: Sequence[str] = (),
        static_argnames: Sequence[str] = (),
    ):
        self._function = function
        self._names = {"donate_argnames": donate_argnames, "static_argnames": static_argnames}
        self._jitted: dict[str, Any] = {}
        _programs[f"jit({function.__name__})"] = self

    def __call__(self, model: Any, *args: Any, **static: Any) -> Any:
        return self._on(model.platform)(model, *args, **static)

    def lower(self, model: Any, *args: Any, **static: Any) -> jax.stages.Lowered:
        """Lowers the program, to be compiled for devices that need not be present."""
        return self._on(model.platform).lower(model, *args, **static)

    def forget(self) -> None:
        """Releases what has been compiled."""
        for jitted in self._jitted.values():
            jitted.clear_cache()

    def _on(self, platform: str) -> Any:
        if platform not in self._jitted:
            options = compiler_options(platform)
            self._jitted[platform] = jax.jit(
                self._function, static_argnums=0, compiler_options=options, **self._names
            )
        return self._jitted[platform]


def forget_compiled_programs() -> None:
    """Releases all compiled Programs: each takes many of the process's memory mappings."""
    for program in _programs.values():
        program.forget()


def _on_event(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _read_from_disk.last = True


def _on_duration(event: str, seconds: float, *, fun_name: str = "", **_: Any) -> None:
    if not event.startswith(_DURATIONS):
        return
    CLOCK.seconds += seconds
    if event == _DURATIONS + "backend_compile_duration":
        CLOCK.compilations += fun_name in _programs and not getattr(_read_from_disk, "last", False)
        _read_from_disk.last = False


jax.monitoring.register_event_listener(_on_event)
jax.monitoring.register_event_duration_secs_listener(_on_duration)


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
