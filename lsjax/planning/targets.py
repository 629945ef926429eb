"""Machines to plan for: how many devices, what each holds and how fast it is."""

import dataclasses
import math
import os
import pathlib
import re
import threading
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from lsjax.errors import UserError
from lsjax.memory import device_memory_bytes, host_memory_bytes
from lsjax.sharding import AXES


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device is capable of at best, as its maker says.

    Attributes:
      flops: products of bfloat16 matrices, in operations a second.
      bandwidth: of its memory, in bytes a second.
      link: to its neighbours, in bytes a second each way, all links together.
    """

    flops: float
    bandwidth: float
    link: float


@dataclasses.dataclass(frozen=True)
class Target:
    """Some devices of a kind.

    Attributes:
      name: as in "v5e:2x4" (a topology of TPUs), "h100-80gb:8" (GPUs of one host), "cpu:8" or
        "here".
      platform: "tpu", "gpu" or "cpu".
      devices: how many there are.
      memory: bytes of each that programs can have.
      rates: or None where nobody has said.
    """

    name: str
    platform: str
    devices: int
    memory: int
    rates: Rates | None


# Bytes of a chip that programs can have, and its rates. Source: cloud.google.com/tpu/docs.
_TPUS = {
    "v5e": (15.75 * 2**30, Rates(197e12, 819e9, 200e9)),
    "v6e": (31.25 * 2**30, Rates(918e12, 1640e9, 448e9)),
    "v5p": (95.74 * 2**30, Rates(459e12, 2765e9, 600e9)),
}
# Source: NVIDIA's data sheets, without sparsity; NVLink, or PCIe for the L40S.
_GPUS = {
    "h100-80gb": Rates(989e12, 3350e9, 450e9),
    "h200": Rates(989e12, 4800e9, 450e9),
    "a100-80gb": Rates(312e12, 2039e9, 300e9),
    "l40s": Rates(362e12, 864e9, 32e9),
}
# A word of JAX's name for a device that is here -> what it is.
_HERE = {
    "H100": _GPUS["h100-80gb"],
    "H200": _GPUS["h200"],
    "A100": _GPUS["a100-80gb"],
    "L40S": _GPUS["l40s"],
    "v5 lite": _TPUS["v5e"][1],
    "v6 lite": _TPUS["v6e"][1],
    "v5p": _TPUS["v5p"][1],
}
# Of a GPU's memory: the rest is its driver's, and JAX's with XLA_PYTHON_CLIENT_MEM_FRACTION=.95.
_GPU_SHARE = 0.95
# Compilers cannot be loaded by two threads at once.
_LOADING = threading.Lock()
_KNOWN = (
    "TPUs by their topology, as v5e:2x4, v6e:2x4 or v5p:2x2x2; GPUs by their number, as "
    f"{', '.join(f'{gpu}:8' for gpu in _GPUS)}; cpu:8 for CPU devices that share this machine's "
    "memory; and here for the devices that are here"
)


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
      UserError: there is none, and which there are.
    """
    kind, _, shape = name.partition(":")
    count = int(shape or 1) if re.fullmatch(r"\d{0,6}", shape) else 0
    if name == "here":
        devices = jax.devices()
        memory = device_memory_bytes(len(devices))
        kind = devices[0].device_kind
        rates = next((rates for word, rates in _HERE.items() if word in kind), None)
        return Target(name, platform_of(devices[0]), len(devices), memory, rates)
    if kind == "cpu" and count:
        return Target(name, "cpu", count, host_memory_bytes() // count, None)
    if kind in _GPUS and count:
        memory = re.search(r"device_memory_size: (\d+)", _description(kind))
        return Target(name, "gpu", count, int(_GPU_SHARE * int(memory.group(1))), _GPUS[kind])
    if kind in _TPUS and re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", shape):
        memory, rates = _TPUS[kind]
        return Target(name, "tpu", math.prod(map(int, shape.split("x"))), int(memory), rates)
    raise UserError(f"target {name!r} is not known; there are {_KNOWN}.")


def platform_of(device: jax.Device) -> str:
    """JAX calls a GPU that is here gpu, and one that is compiled for cuda."""
    return "gpu" if device.platform == "cuda" else device.platform


def target_mesh(target: Target, sizes: Mapping[str, int]) -> Mesh:
    """A mesh to compile programs for; but for cpu and here, of devices that are not here.

    Args:
      target: the devices.
      sizes: devices along each axis; 1 for an axis that is not named.

    Raises:
      UserError: the target has fewer devices, or its compiler is not installed.
    """
    shape = [sizes.get(axis, 1) for axis in AXES]
    count = math.prod(shape)
    if count > target.devices:
        raise UserError(f"the mesh needs {count} devices, but {target.name} has {target.devices}.")
    devices = np.asarray(_devices(target, count)).flat[:count]
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _devices(target: Target, count: int) -> list:
    kind = target.name.partition(":")[0]
    if kind in ("here", "cpu"):
        devices = jax.devices() if kind == "here" else jax.devices("cpu")
        if len(devices) < count:
            raise UserError(
                f"{count} CPU devices cannot be compiled for: this process has {len(devices)}; "
                f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
            )
        return devices
    try:
        with _LOADING:
            return _topology(target.name, kind, count)
    except Exception as error:
        raise UserError(
            f"there is no compiler for {target.name} here: pip install 'lsjax[ahead]', or leave "
            f"compiling out. JAX says: {(str(error).splitlines() or ['nothing'])[0]}"
        ) from None


def _topology(name: str, kind: str, count: int) -> list:
    if kind in _GPUS:
        return topologies.get_topology_desc(
            "gpu", "cuda", target_config=_description(kind), topology=f"1x1x{count}"
        ).devices
    # libtpu would ask a cloud's metadata server what machine it is on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # A chip alone has no topology: it is one of a few.
    alone = {"v5e:1x1": "v5e:2x4", "v6e:1x1": "v6e:2x4", "v5p:1x1x1": "v5p:2x2x2"}
    return topologies.get_topology_desc(platform="tpu", topology_name=alone.get(name, name)).devices


def _description(gpu: str) -> str:
    """XLA's description of a GPU."""
    return (pathlib.Path(__file__).parent / f"{gpu}.txtpb").read_text()
