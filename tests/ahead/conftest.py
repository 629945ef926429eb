"""Programs compiled for accelerators that are not here; set before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would ask a cloud's metadata server what it is on
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # there is no TPU for two workers to quarrel over
del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]  # these compilers are asked as users ask them
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # what is asked for is what compilers say

import jax
import pytest

_LEAST = -1.0


@pytest.fixture(autouse=True)
def _effort(request):
    """A TPU's compiler spends most of its time on the order of instructions, which few tests look
    at; memory hardly depends on it."""
    effort = 0.0 if request.node.get_closest_marker("as_users_compile") else _LEAST
    jax.config.update("jax_exec_time_optimization_effort", effort)
