"""Eight CPU devices, so that every mesh can be tested; set before JAX is imported."""

import gc
import importlib.metadata
import os
import pathlib

import pytest

_FLAGS = ["--xla_force_host_platform_device_count=8"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older code generator, gone since 0.11, takes half as long and its code runs as fast.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
# Compiling takes longer than running, and nearly half of it are LLVM's passes. XLA's are the same
# without them, as are the matrix products. Programs that tests start inherit both settings, but
# those of tests/hosts have the newer generator, and those of test_run_pa are compiled as users have
# them.
_WITHOUT_PASSES = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ[_WITHOUT_PASSES] = "1"
