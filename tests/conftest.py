"""How tests run: eight CPU devices, so that every mesh can be tested, and quick compiling."""

import collections
import gc
import os
import pathlib
import time

import pytest

_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    # The older code generator takes half as long, and its code runs as fast.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
]
# Before JAX is imported. Programs that tests start inherit what is set here, but the demo of
# test_run_pa is compiled as users have it.
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
# Compiling takes longer than running, and nearly half of it are LLVM's passes. XLA's are the same
# without them, as are the matrix products.
_WITHOUT_PASSES = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ[_WITHOUT_PASSES] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
_WEEK = 7 * 24 * 3600
_MANY_MAPPINGS = 25_000


def pytest_configure(config):
    """All workers share one cache of compiled programs, which the next run finds as well."""
    if hasattr(config, "workerinput"):
        return  # it has the environment of the process that started it
    folder = config.rootpath / ".pytest_cache" / "compiled"
    for file in folder.glob("*"):
        if file.stat().st_mtime < time.time() - _WEEK:
            file.unlink(missing_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker begins a long one as the last."""
    slow_in = collections.Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        if slow and not slow.args:
            raise pytest.UsageError(f"{item.nodeid} is slow, and does not say why that is no loss")
        slow_in[item.path] += slow is not None
    items.sort(key=lambda item: -slow_in[item.path])


def pytest_collection_finish():
    """What has been imported stays: looking through it takes longer than all other garbage."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests marked runs_long have LLVM's passes, as do the fixtures that are made for them."""
    import jax

    without = _WITHOUT_PASSES in os.environ and not item.get_closest_marker("runs_long")
    jax.config.update(_WITHOUT_PASSES.lower(), without)


@pytest.fixture(scope="module", autouse=True)
def _few_memory_mappings():
    """A compiled program takes hundreds of the 65,530 memory mappings that a process may hold."""
    import jax

    from lsjax.runtime.compilation import forget_compiled_programs

    yield
    mappings = pathlib.Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        forget_compiled_programs()
        jax.clear_caches()
        gc.collect()
