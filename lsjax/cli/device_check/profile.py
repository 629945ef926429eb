"""Profiles the GPU's decode kernel with Nsight Compute."""

import subprocess
import sys

import jax
import jax.numpy as jnp

from lsjax.cli.device_check.record import Recorder
from lsjax.cli.device_check.sizes import HEADS, Sizes
from lsjax.cli.device_check.timing import random_array, random_kv_array

_SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "SchedulerStats")
_KEYS = 1_048_576


def ncu(sizes: Sizes, record: Recorder) -> None:
    """Profiles one launch of the kernel with ncu, in its own process."""
    command = ["ncu", "--clock-control", "none", "--kernel-name", "regex:decode_attention"]
    command += ["--launch-skip", "2", "--launch-count", "1"]
    command += [word for section in _SECTIONS for word in ("--section", section)]
    done = subprocess.run(
        [*command, sys.executable, "-m", __name__], capture_output=True, text=True
    )
    record(
        what="ncu", returncode=done.returncode, said=done.stdout[-6000:], errors=done.stderr[-500:]
    )


def launch_decode_kernel() -> None:
    """Launches the decode kernel four times over a million int8 keys."""
    from lsjax.attention import gpu

    heads = HEADS["GLM-4-9B"]
    shape = 1, heads.kv_heads, _KEYS, heads.head_dim
    k, v = random_kv_array(shape, "int8", 0), random_kv_array(shape, "int8", 1)
    q = random_array((1, heads.kv_heads, heads.group, 1, heads.head_dim), "bfloat16", 2)
    end = jnp.full((1, 1), _KEYS, jnp.int32)
    slots = gpu.Slots(k.data, v.data, k.scale, v.scale, 0 * end, end)
    for _ in range(4):
        jax.block_until_ready(gpu.decode(q, slots))


if __name__ == "__main__":
    launch_decode_kernel()
