"""Machines that programs are compiled for without being on them."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from lsjax.errors import UserError
from lsjax.sharding import AXES

# Bytes of a chip's memory that programs can have.
_TPU_MEMORY = {"v5e": 15.75 * 2**30, "v6e": 31.25 * 2**30, "v5p": 95.74 * 2**30}
_GPUS = {
    file.stem: file.read_text() for file in sorted(pathlib.Path(__file__).parent.glob("*.txtpb"))
}
_EXAMPLES = f"{', '.join(f'{gpu}:8' for gpu in _GPUS)}, v5e:2x4, v6e:2x4 and v5p:2x2x2"


@dataclasses.dataclass(frozen=True)
class Target:
    """Some devices of a kind.

    Attributes:
      name: as in "v5e:2x4" (a topology of TPUs) or "h100-80gb:8" (GPUs of one host).
      kind: what stands before the colon.
      devices: how many there are.
      memory: bytes of each that programs can have.
    """

    name: str
    kind: str
    devices: int
    memory: int


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
      UserError: there is none, and which there are.
    """
    kind, _, shape = name.partition(":")
    if kind in _GPUS and (shape or "1").isdecimal() and int(shape or 1) > 0:
        memory = re.search(r"device_memory_size: (\d+)", _GPUS[kind])
        return Target(name, kind, int(shape or 1), int(memory.group(1)))
    if kind in _TPU_MEMORY and re.fullmatch(r"\d{1,3}(x\d{1,3}){1,2}", shape):
        devices = int(np.prod([int(n) for n in shape.split("x")]))
        return Target(name, kind, devices, int(_TPU_MEMORY[kind]))
    raise UserError(f"target {name!r} is not known; there are, for example, {_EXAMPLES}.")


def target_mesh(target: Target, sizes: Mapping[str, int]) -> Mesh:
    """A mesh of devices that are not here: programs can be compiled for it, but not run.

    Args:
      target: the devices.
      sizes: devices along each axis; 1 for an axis that is not named.

    Raises:
      UserError: the target has fewer devices, or its compiler is not installed.
    """
    shape = [sizes.get(axis, 1) for axis in AXES]
    count = int(np.prod(shape))
    if count > target.devices:
        raise UserError(f"the mesh needs {count} devices, but {target.name} has {target.devices}.")
    devices = np.asarray(_devices(target, count)).flat[:count]
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _devices(target: Target, count: int) -> list:
    try:
        if target.kind in _GPUS:
            return topologies.get_topology_desc(
                "gpu", "cuda", target_config=_GPUS[target.kind], topology=f"1x1x{count}"
            ).devices
        # libtpu would ask a cloud's metadata server what machine it is on.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name=target.name).devices
    except Exception as error:
        raise UserError(
            f"there is no compiler for {target.name} here: pip install 'lsjax[ahead]'. JAX says: "
            f"{(str(error).splitlines() or ['nothing'])[0]}"
        ) from None
