"""Eight CPU devices, so that every mesh can be tested; set before JAX is imported."""

import gc
import os

import pytest

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Most of a test is LLVM's time. Without its passes XLA's are the same, as are the matrix products.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


def pytest_collection_finish():
    """What has been imported stays: looking through it takes longer than all other garbage."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A compiled program takes hundreds of the 65,530 memory mappings that a process may hold."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
