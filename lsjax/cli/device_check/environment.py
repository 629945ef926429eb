"""Records which packages are installed and which devices they run on."""

import importlib.metadata
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp

from lsjax.cli.device_check.record import Recorder
from lsjax.cli.device_check.sizes import Sizes

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "libtpu",
    "torch",
)
_CUDNN_AT_LEAST = 91200  # required by JAX 0.11; XLA does not use an older cuDNN


def versions(sizes: Sizes, record: Recorder) -> None:
    """Records the device and the versions of packages and drivers; checks one matrix product."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    record(
        platform=device.platform,
        device=device.device_kind,
        devices=jax.device_count(),
        bytes_limit=stats.get("bytes_limit"),
        python=sys.version.split()[0],
    )
    found = {name: _version(name) for name in _PACKAGES}
    record(packages={name: version for name, version in found.items() if version})
    if gpus := _nvidia_smi():
        record(nvidia_smi=gpus)
        if device.platform == "cpu":
            record(warning="a GPU is here, but JAX runs on the CPU: pip install 'jax[cuda13]'")
    if device.platform == "gpu":
        version = _cudnn()
        record(cudnn=version)
        if jax.__version_info__ >= (0, 11) and version and version < _CUDNN_AT_LEAST:
            record(warning="JAX 0.11 goes without cuDNN unless it is 9.12 or newer")
    ones = jnp.ones((256, 256), jnp.bfloat16)
    product = float(jnp.sum((ones @ ones).astype(jnp.float32)))
    record(check="a product of ones", ok=product == 256**3, got=product)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str:
    """Returns the driver's list of GPUs with memory, clocks and power limit; empty without any."""
    if not shutil.which("nvidia-smi"):
        return ""
    asked = "name,memory.total,memory.used,driver_version,clocks.sm,clocks.max.sm,clocks.max.mem"
    command = ["nvidia-smi", f"--query-gpu={asked},power.limit", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cudnn() -> int | None:
    """Returns the version of cuDNN that JAX has loaded, such as 91200 for 9.12.0."""
    try:
        from jax._src.lib import cuda_versions

        return cuda_versions.cudnn_get_version()
    except Exception:  # a private module; its absence is not the device's fault
        return None
