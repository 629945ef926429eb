"""Eight CPU devices, so that every mesh can be tested; set before JAX is imported."""

import gc
import os

import pytest

# The older code generator takes half as long and its code runs as fast.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
)
# Compiling takes longer than running, and nearly half of it are LLVM's passes. XLA's are the same
# without them, as are the matrix products. Programs that tests start inherit both settings, but
# those of tests/hosts have the newer generator, and those of test_run_pa are compiled as users have
# them.
_WITHOUT_PASSES = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ[_WITHOUT_PASSES] = "1"


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
def _programs_of_a_module():
    """A compiled program takes hundreds of the 65,530 memory mappings that a process may hold."""
    import jax

    yield
    jax.clear_caches()
    gc.collect()
