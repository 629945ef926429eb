"""What the streaming writer writes, the safetensors library and Orbax read."""

import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lsjax.checkpoint.safetensors_header import read_header
from lsjax.checkpoint.safetensors_writer import aligned, write_safetensors

names = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda name: name != "__metadata__"
)
dtypes = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def write(file, tensors):
    abstract = {n: jax.ShapeDtypeStruct(t.shape, t.dtype) for n, t in tensors.items()}
    write_safetensors(file, abstract, (tensors[name] for name in aligned(abstract)))


def random_tensors(specs):
    random = np.random.default_rng(0)
    # Any bytes, so that NaNs with payloads and denormals are among them.
    return {
        name: np.frombuffer(
            random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype
        ).reshape(shape)
        for name, (shape, dtype) in specs.items()
    }


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(names, st.tuples(shapes, dtypes), max_size=6))
def test_every_tensor_reads_back_bit_for_bit(specs):
    tensors = random_tensors(specs)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.safetensors")
        write(file, tensors)
        found = load_file(file)
        headers = read_header(file)
    assert set(found) == set(headers) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == headers[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes()


def test_orbax_reads_it(tmp_path):
    tensors = random_tensors({"a": ((3, 4), np.float32), "b": ((5,), ml_dtypes.bfloat16)})
    file = str(tmp_path / "model.safetensors")
    write(file, tensors)
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
        found = ocp.load(file)
    assert {name: np.asarray(a).tobytes() for name, a in found.items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }


def test_too_little_content_is_no_file(tmp_path):
    abstract = {"a": jax.ShapeDtypeStruct((2, 2), np.float32)}
    with pytest.raises(ValueError, match="takes 16 bytes, not 8"):
        write_safetensors(str(tmp_path / "x.safetensors"), abstract, [np.zeros(2, np.float32)])
