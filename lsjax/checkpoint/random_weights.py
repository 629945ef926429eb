"""Writes checkpoints of random weights with the shapes of real ones, for measurements."""

import os
import shutil
import zlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from lsjax.checkpoint.hf_checkpoint import abstract_tensor
from lsjax.checkpoint.safetensors_writer import aligned, write_safetensors
from lsjax.distributed.sharding import make_mesh
from lsjax.families import family_of, read_config
from lsjax.nn.parameters import abstract_parameters


def write_random_checkpoint(config_file: str, folder: str) -> None:
    """Writes a Hugging Face folder: the given config.json and one model.safetensors.

    Weights are normal with standard deviation 0.02, norms are 1 and biases 0, in the config's
    dtype. One tensor at a time is in memory.

    Args:
      config_file: path of a config.json of a supported family.
      folder: existing folder to write into.

    Raises:
      UserError: the config is invalid.
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
