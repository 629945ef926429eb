"""What is installed, and what it runs on."""

import importlib.metadata
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp

from lsjax.device_check.record import Recorder
from lsjax.device_check.sizes import Sizes

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
_CUDNN_AT_LEAST = 91200  # what JAX 0.11 asks for; with an older one XLA goes without


def versions(sizes: Sizes, record: Recorder) -> None:
    """Writes the versions of packages and drivers, and what the device says of itself."""
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
    if device.platform == "gpu":
        _describe_gpu(record)
    ones = jnp.ones((256, 256), jnp.bfloat16)
    product = float(jnp.sum((ones @ ones).astype(jnp.float32)))
    record(check="a product of ones", ok=product == 256**3, got=product)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_gpu(record: Recorder) -> None:
    if shutil.which("nvidia-smi"):
        asked = "name,memory.total,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        record(nvidia_smi=done.stdout.strip() or done.stderr.strip())
    try:
        from jax._src.lib import cuda_versions

        cudnn = cuda_versions.cudnn_get_version()
    except Exception as error:  # a private module: its absence is no fault of the device
        record(cudnn=None, why=repr(error)[:200])
        return
    record(check="cuDNN is 9.12 or newer", ok=cudnn >= _CUDNN_AT_LEAST, got=cudnn)
