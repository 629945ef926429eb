"""Eight CPU devices, so that every mesh can be tested; set before JAX is imported."""

import gc
import os

import pytest

# The older code generator takes half as long and its code runs as fast. What runs in processes of
# its own (tests/hosts and the like) has the one that users have.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
)
# Where compiling takes longer than running, programs go without LLVM's passes. XLA's are the same,
# as are the matrix products.
_COMPILED_QUICKLY = {"attention", "checkpoint", "generation", "nn", "planning", "training"}


def pytest_collection_finish():
    """What has been imported stays: looking through it takes longer than all other garbage."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module(request):
    """A compiled program takes hundreds of the 65,530 memory mappings that a process may hold."""
    import jax

    quickly = request.path.parent.name in _COMPILED_QUICKLY
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.clear_caches()
    gc.collect()
