"""Targets to plan for: the number of devices, and the memory and rates of each."""

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

from lsjax.distributed.sharding import AXES
from lsjax.runtime.devices import GPUS, TPUS, Rates, peak_rates
from lsjax.runtime.errors import UserError
from lsjax.runtime.memory import device_memory_bytes, host_memory_bytes


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind.

    Attributes:
      name: name such as "v5e:2x4" (a TPU topology), "h100-80gb:8" (GPUs of one host), "cpu:8" or
        "here".
      platform: "tpu", "gpu" or "cpu".
      devices: number of devices.
      memory: bytes per device that programs can use.
      rates: peak rates per device, or None if unknown.
      capability: major number of a GPU's compute capability; 0 for what is no GPU.
    """

    name: str
    platform: str
    devices: int
    memory: int
    rates: Rates | None
    capability: int = 0


# Share of a GPU's memory that programs can use, as with XLA_PYTHON_CLIENT_MEM_FRACTION=.95. The
# driver and JAX itself take the rest.
_GPU_SHARE = 0.95
_READ_OF_GPUS = "device_memory_size", "major"  # in XLA's description
# Two threads must not load a compiler at once.
_LOADING = threading.Lock()
_KNOWN = (
    "TPUs by their topology, as v5e:2x4, v6e:2x4 or v5p:2x2x2; GPUs by their number, as "
    f"{', '.join(f'{gpu}:8' for gpu in GPUS)}; cpu:8 for CPU devices that share this machine's "
    "memory; and here for the devices that are here"
)


def find_target(name: str) -> Target:
    """Returns the target with a name.

    Raises:
      UserError: the name is unknown; the message lists what there is.
    """
    kind, _, shape = name.partition(":")
    count = int(shape or 1) if re.fullmatch(r"\d{0,6}", shape) else 0
    if name == "here":
        devices = jax.devices()
        memory = device_memory_bytes(len(devices))
        rates = peak_rates(devices[0].device_kind)
        platform = platform_of(devices[0])
        capability = int(float(devices[0].compute_capability)) if platform == "gpu" else 0
        return Target(name, platform, len(devices), memory, rates, capability)
    if kind == "cpu" and count:
        return Target(name, "cpu", count, host_memory_bytes() // count, None)
    if kind in GPUS and count:
        found = (re.search(rf"{name}: (\d+)", _description(kind)) for name in _READ_OF_GPUS)
        memory, capability = (int(number.group(1)) for number in found)
        return Target(name, "gpu", count, int(_GPU_SHARE * memory), GPUS[kind], capability)
    if kind in TPUS and re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", shape):
        memory, rates = TPUS[kind]
        return Target(name, "tpu", math.prod(map(int, shape.split("x"))), int(memory), rates)
    raise UserError(f"target {name!r} is not known; there are {_KNOWN}.")


def platform_of(device: jax.Device) -> str:
    """Returns a device's platform: JAX calls a local GPU gpu, but one to compile for cuda."""
    return "gpu" if device.platform == "cuda" else device.platform


def target_mesh(target: Target, sizes: Mapping[str, int]) -> Mesh:
    """Makes a mesh to compile programs for; its devices are local only for "cpu" and "here".

    Args:
      target: devices to compile for.
      sizes: number of devices by axis name; 1 for an axis that is not named.

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
    if kind in GPUS:
        return topologies.get_topology_desc(
            "gpu", "cuda", target_config=_description(kind), topology=f"1x1x{count}"
        ).devices
    # Otherwise libtpu asks the cloud's metadata server which machine it runs on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # There is no topology of a single chip, so it is taken from a small one.
    alone = {"v5e:1x1": "v5e:2x4", "v6e:1x1": "v6e:2x4", "v5p:1x1x1": "v5p:2x2x2"}
    return topologies.get_topology_desc(platform="tpu", topology_name=alone.get(name, name)).devices


def _description(gpu: str) -> str:
    """Returns XLA's description of a GPU."""
    return (pathlib.Path(__file__).parent / f"{gpu}.txtpb").read_text()
