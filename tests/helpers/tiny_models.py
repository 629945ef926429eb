"""Tiny models, and batches of random documents, for the tests of training."""

import dataclasses

import jax
import numpy as np

from lsjax.config import LayerKind
from lsjax.distributed.sharding import make_mesh
from lsjax.families import parse_config
from lsjax.nn.parameters import random_parameters
from lsjax.shipped.model import HF_CONFIGS
from lsjax.training.batch import Batch

_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tiny(kind):
    """Returns a config: rotary, tied, with a window in one layer; or ALiBi, with a normalized head
    of its own."""
    sizes = _SIZES | (_HEADS if kind == "rotary" else {"num_attention_heads": 4})
    config = parse_config(HF_CONFIGS[kind] | sizes)
    if kind == "rotary":
        return dataclasses.replace(config, layers=(LayerKind(), LayerKind(11)))
    return dataclasses.replace(config, normalized_head=True)


def parameters(config, mesh="", scale=4.0):
    """On the mesh; large enough that the model is not indifferent."""
    params = random_parameters(config, make_mesh(mesh), "float32")
    return jax.tree.map(lambda x: _times(x, scale) if x.ndim > 1 else x, params)


@jax.jit
def _times(x, scale):
    return x * scale


def documents(rows, length, seed=0, most=4):
    """A batch [rows, length] of rows cut into documents at random; every fifth target is out."""
    rng = np.random.default_rng(seed)
    at, begins = np.arange(length), []
    for _ in range(rows):
        starts = np.unique([0, *rng.integers(0, length, rng.integers(0, most))])
        begins.append(starts[np.searchsorted(starts, at, side="right") - 1])
    begin = np.array(begins, np.int32)
    tokens = rng.integers(0, 64, (rows, length + 1), np.int32)
    weights = rng.random((rows, length), np.float32) * (at % 5 > 0)
    return Batch(tokens[:, :-1], tokens[:, 1:], (at - begin).astype(np.int32), begin, weights)


def in_parts(batch, parts):
    """[rows, length] -> [parts, rows / parts, length]."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[1]), batch)
