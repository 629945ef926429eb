"""The golden models' weights as a parameter tree, by way of their checkpoint names."""

import numpy as np
from golden.models.weights import SEED, tensor

from lsjax.config import ModelConfig
from lsjax.distributed.sharding import make_mesh, parse_mesh
from lsjax.families import family_of
from lsjax.nn.parameters import abstract_parameters, unflatten


def golden_parameters(config: ModelConfig) -> dict:
    """Each tensor of the checkpoint, fused ones split along their first axis, experts stacked."""
    shapes = {
        path: leaf.shape
        for path, leaf in abstract_parameters(config, make_mesh(parse_mesh("")), "float32").items()
    }
    flat = {}
    for entry in family_of(config).tensors(config):
        if entry.index is not None:
            (path,) = entry.params
            flat.setdefault(path, np.empty(shapes[path], np.float32))
            flat[path][entry.index] = tensor(SEED, entry.name, shapes[path][1:])
            continue
        rows = [shapes[path][0] for path in entry.params]
        shape = sum(rows), *shapes[entry.params[0]][1:]
        fused = tensor(SEED, entry.name, shape, config.zero_centered_norms)
        for path, part in zip(entry.params, np.split(fused, np.cumsum(rows)[:-1]), strict=True):
            assert path not in flat, path
            flat[path] = part
    assert set(flat) == set(shapes)
    return unflatten(flat)
