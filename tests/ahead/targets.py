"""Meshes of devices that are not here, with the model's axes."""

import pathlib

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

H100 = (pathlib.Path(__file__).parent / "h100.txtpb").read_text()


def mesh_of(target: str, data: int = 1, context: int = 1, model: int = 1) -> Mesh:
    """The first devices of a TPU topology ("v5e:2x4"), or of "h100"."""
    if target == "h100":
        count = data * context * model
        found = topologies.get_topology_desc(
            "h100", "cuda", target_config=H100, topology=f"1x1x{count}"
        )
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target)
    devices = np.asarray(found.devices).flat[: data * context * model]
    axes = ("data", "context", "model")
    return Mesh(devices.reshape(data, context, model), axes, axis_types=(AxisType.Auto,) * 3)
