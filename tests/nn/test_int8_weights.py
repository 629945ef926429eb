"""int8 weights: products against float64, and models against those whose weights are rounded."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import make_folder, mesh
from helpers.golden_models import build

import lsjax
from lsjax import UserError
from lsjax.checkpoint import convert_hf_to_orbax, convert_orbax_to_hf, load_parameters
from lsjax.families import read_config
from lsjax.nn.int8_weights import float_matrix, quantize_matrix
from lsjax.nn.matmul import CPU_DIGIT_BATCH, matmul
from lsjax.nn.parameters import flatten

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 40))


def test_entries_are_within_half_a_step_and_the_largest_is_exact():
    weight = np.random.default_rng(0).standard_normal((9, 50)).astype(np.float32)
    weight[3] = 0
    data, scale = map(np.asarray, quantize_matrix(jnp.asarray(weight)))
    assert data.dtype == np.int8 and np.abs(data).max() == 127
    assert np.all(np.abs(data * scale[:, None] - weight) <= 0.501 * scale[:, None])
    np.testing.assert_allclose(np.abs(data * scale[:, None]).max(1), np.abs(weight).max(1))
    assert not data[3].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vectors", [1, CPU_DIGIT_BATCH[-1], CPU_DIGIT_BATCH[-1] + 1])
def test_products_are_as_near_as_those_of_floats(dtype, vectors):
    rng = np.random.default_rng(vectors)
    x = rng.standard_normal((1, vectors, 300)).astype(np.float32)
    x[..., 7] *= 1e3  # as models have it: one channel that is far larger than the others
    x[:, -1, 7] = 0
    x = jnp.asarray(x, dtype)
    data, scale = quantize_matrix(rng.standard_normal((70, 300)))
    rounded = np.asarray(data, np.float64) * np.asarray(scale, np.float64)[:, None]
    exact, wide = np.asarray(x, np.float64) @ rounded.T, jnp.asarray(rounded, dtype)
    # Added up in order, since a CPU's own order depends on the width of its vectors.
    terms = np.asarray(x, np.float32)[:, :, None] * np.asarray(wide, np.float32)
    plain = np.add.accumulate(terms, axis=-1)[..., -1]
    found, plain = (
        np.linalg.norm(np.asarray(y, np.float64) - exact, axis=-1)
        for y in (matmul(x, data, scale), plain)
    )
    # The scale comes last, so that each result is rounded once more.
    limit = 2 * plain + 2**-24 * np.linalg.norm(exact, axis=-1)
    for vectors in (np.s_[:, :-1], np.s_[:, -1]):
        assert np.sum(found[vectors]) <= np.sum(limit[vectors])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_any_number_of_vectors_are_the_same(dtype):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((1, 33, 300), (70, 300)))
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    for count in (1, 2, 9, 33):
        np.testing.assert_allclose(matmul(x[:, :count], weight), exact[:, :count], atol=1e-4)


slow = pytest.mark.slow("families share their products; a tied and a normalized head are quick")


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_tied",
        "alibi_8_heads",
        *(
            pytest.param(name, marks=slow)
            for name in ("qwen3", "llama_biases", "glm", "glm4", "chatglm_1m")
        ),
    ],
)
def test_logits_are_those_of_the_rounded_weights(name):
    exact, int8 = build(name, layers=1), build(name, weight_dtype="int8", layers=1)
    rounded = lsjax.LanguageModel(exact.options, _rounded(int8.params, exact.params))
    found = int8.logits(TOKENS)
    np.testing.assert_allclose(found, rounded.logits(TOKENS), atol=1e-4)
    # The weights are random, so that rounding errors of all of them add up.
    wanted = exact.logits(TOKENS)
    assert np.std(found - wanted) < 0.03 * np.std(wanted)


def _rounded(params, like):
    """Float parameters with the values of int8 ones."""
    if "scale" in params:
        rounded = float_matrix(params).astype(like["weight"].dtype)
        return {k: rounded if k == "weight" else params[k] for k in like}
    return {k: _rounded(v, like[k]) if isinstance(v, dict) else v for k, v in params.items()}


@pytest.mark.slow("products are quick, and so are tokens on a mesh and folders of floats")
@pytest.mark.parametrize(("architecture", "devices"), [("GlmForCausalLM", "context=2,model=2")])
def test_a_folder_is_quantized_while_it_is_read_saved_and_converted_back(
    tmp_path, architecture, devices
):
    hf = make_folder(tmp_path / "hf", architecture)
    (hf / "tokenizer.json").unlink()
    config, on = read_config(hf), mesh(devices)
    floats = flatten(load_parameters(hf, config, on, "float32"))
    lm = lsjax.load(hf, mesh=devices, weight_dtype="int8")
    found = flatten(lm.params)
    for path, x in found.items():
        if x.dtype == jnp.int8:
            data, scale = quantize_matrix(floats[path])
            np.testing.assert_array_equal(x, data, path)
            np.testing.assert_array_equal(found[path.removesuffix("weight") + "scale"], scale)

    lm.save(tmp_path / "saved")
    convert_hf_to_orbax(hf, tmp_path / "converted", weight_dtype="int8")
    answer = lm.generate([[5, 6, 7]], 8)[0].token_ids
    for folder in ("saved", "converted"):
        again = lsjax.load(tmp_path / folder)
        assert again.options.weight_dtype == "int8"
        assert again.generate([[5, 6, 7]], 8)[0].token_ids == answer
        with pytest.raises(UserError, match="int8 weights"):
            load_parameters(tmp_path / folder, config, on, "float32")

    convert_orbax_to_hf(tmp_path / "saved", tmp_path / "back")
    back = flatten(load_parameters(tmp_path / "back", config, on, "float32"))
    for path, x in back.items():
        step = found[path.removesuffix("weight") + "scale"] if x.ndim > 1 else 0
        near = 0.51 * np.asarray(step)[..., None] + 2**-8 * np.abs(floats[path])
        assert np.all(np.abs(np.asarray(x) - floats[path]) <= near), path
