"""A checkpoint of random weights, in the shape of a real one: to measure with."""

import os
import shutil
import zlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from lsjax.checkpoint.safetensors_writer import aligned, write_safetensors
from lsjax.checkpoint.tensors import abstract_tensor
from lsjax.families import family_of, read_config
from lsjax.nn.parameters import abstract_parameters
from lsjax.sharding import make_mesh


def write_random_checkpoint(config_file: str, folder: str) -> None:
    """Writes a Hugging Face folder: config.json as given, and one model.safetensors.

    Weights are normal with the deviation 0.02, norms 1, biases 0, in the config's dtype. One
    tensor at a time is in memory.

    Args:
      config_file: a config.json of a supported family.
      folder: an existing folder to write into.

    Raises:
      UserError: the config is wrong.
    """
    config = read_config(config_file)
    params = abstract_parameters(config, make_mesh(""), config.dtype)
    tensors = {t.name: abstract_tensor(t, params) for t in family_of(config).tensors(config)}

    def arrays() -> Iterator[np.ndarray]:
        for name, tensor in aligned(tensors).items():
            if name.endswith("bias"):
                values = np.zeros(tensor.shape, np.float32)
            elif len(tensor.shape) == 1:
                values = np.ones(tensor.shape, np.float32)
            else:
                rng = np.random.default_rng(zlib.crc32(name.encode()))
                values = 0.02 * rng.standard_normal(tensor.shape, np.float32)
            yield values.astype(jnp.dtype(tensor.dtype))

    write_safetensors(os.path.join(folder, "model.safetensors"), tensors, arrays())
    shutil.copyfile(config_file, os.path.join(folder, "config.json"))
