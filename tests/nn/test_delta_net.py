"""Models with recurrent layers: against transformers' logits, and against themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.golden_models import CONFIGS, build, changed_config, golden_logits, mesh_of, parameters
from safetensors.numpy import load_file, save_file

import lsjax
from lsjax import UserError
from lsjax.cache import CacheSpec, empty_state
from lsjax.checkpoint import convert_hf_to_orbax, convert_orbax_to_hf, load_parameters
from lsjax.checkpoint.random_weights import write_random_checkpoint
from lsjax.distributed.sequence_layout import ONE_DEVICE
from lsjax.distributed.sharding import check_fits_mesh, make_mesh
from lsjax.families import read_config
from lsjax.nn.attention import LayerInputs
from lsjax.nn.delta_net import GatedDeltaNet
from lsjax.nn.layer_modules import keep_accepted
from lsjax.nn.parameters import flatten

DENSE, IMAGES, EXPERTS = "qwen3_5", "qwen3_5_with_images", "qwen3_5_moe"
slow = functools.partial(pytest.param, marks=pytest.mark.slow("one chunk and one mesh are quick"))


@pytest.mark.parametrize(
    ("name", "chunk", "mesh"),
    [
        (DENSE, 24, "122"),
        slow(DENSE, 7, "111"),
        *(slow(name, 64, "111") for name in (DENSE, IMAGES)),
        slow(DENSE, 1, "111"),
        slow(EXPERTS, 160, "111"),
        slow(DENSE, 24, "121"),
        slow(IMAGES, 64, "141"),
        slow(DENSE, 24, "124"),
        slow(EXPERTS, 64, "212"),
        slow(DENSE, 64, "222"),
    ],
)
def test_logits_are_those_of_transformers(name, chunk, mesh):
    data = golden_logits(name)
    found = build(name, chunk=chunk, mesh=mesh_of(mesh)).logits(data["tokens"].tolist())
    found = np.stack(found)[:, data["positions"]]
    np.testing.assert_allclose(found, data["logits"], rtol=0, atol=1e-4)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 90, n).tolist() for n in (70, 5, 37)]


def greedy(prompts, name=DENSE, tokens=12, **options):
    done = build(name, **options).generate(
        prompts, tokens, allow_untrained_length=True, max_input_length=100
    )
    return [c.token_ids for c in done]


def step_by_step(ids, name=DENSE, tokens=6):
    """Greedy tokens from the logits of ever longer prompts, each run whole."""
    lm, ids = build(name), list(ids)
    for _ in range(tokens):
        ids.append(int(lm.logits([ids])[0][-1].argmax()))
    return tuple(ids[-tokens:])


def layer():
    """The first layer of the dense model: (x, state, lengths) -> (y, state), and an empty state."""
    config = changed_config(DENSE, 0)
    (net,) = config.recurrences
    module = GatedDeltaNet(net, config, make_mesh(""))
    params = {"params": parameters(DENSE, 0, "", "auto")["layers_0"]["delta_net"]}

    @functools.partial(jax.jit, static_argnames="decode")
    def run(x, state, lengths=None, decode=False):
        at = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        inputs = LayerInputs(positions=at, lengths=lengths, decode=decode)
        return module.apply(params, x, inputs, state)

    return run, empty_state(net, 2, "float32", ONE_DEVICE)


def assert_same_row(state, expected, row):
    for x, y in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_allclose(x[row], y[row], atol=1e-5)


def test_padding_leaves_no_trace():
    """A row that ends before the other, after one token in the chunk and before all of the next."""
    run, state = layer()
    x = jax.random.normal(jax.random.key(0), (2, 9, 64))
    _, padded = run(x, state, jnp.array([9, 1]))
    assert_same_row(padded, run(x, state)[1], 0)
    _, after_one = run(x[:, :1], state)
    assert_same_row(padded, after_one, 1)
    assert_same_row(run(x, padded, jnp.array([9, 0]))[1], after_one, 1)


@pytest.mark.slow("padding, chunks and a mesh are quick")
def test_tokens_depend_on_the_prompt_alone():
    alone = [greedy([p], EXPERTS)[0] for p in prompts()]
    assert greedy(prompts(), EXPERTS, chunk=16, segment=1) == alone
    assert greedy(prompts()[:2], EXPERTS, mesh=mesh_of("222")) == alone[:2]
    assert step_by_step(prompts()[0], EXPERTS) == alone[0][:6]


@pytest.mark.slow("a token of a draft that is refused is quick")
def test_tokens_do_not_depend_on_drafts():
    """Rows that repeat themselves and one that does not, over int8 keys and weights on a mesh."""
    texts, kind = [prompts()[1] * 9, prompts()[2]], {"weight_dtype": "int8", "kv": "int8"}
    lm = build(DENSE, mesh=mesh_of("122"), **kind)
    usual, done = (
        lm.generate(texts, 24, allow_untrained_length=True, prompt_lookup_num_tokens=drafted)
        for drafted in (0, 3)
    )
    assert [c.token_ids for c in done] == [c.token_ids for c in usual]
    assert done[0].stats.decode_steps < usual[0].stats.decode_steps


def test_a_refused_token_of_a_draft_leaves_no_trace():
    run, start = layer()
    x = jax.random.normal(jax.random.key(0), (2, 3, 64))
    states, outputs = [start], []
    for t in range(3):
        y, state = run(x[:, t : t + 1], states[-1], decode=True)
        states.append(state)
        outputs.append(y)
    y, drafted = run(x, start, decode=True)
    np.testing.assert_allclose(y, jnp.concatenate(outputs, axis=1), atol=1e-5)
    (kept,) = jax.jit(keep_accepted)((drafted,), jnp.array([3, 1]))
    for row, count in enumerate((3, 1)):
        assert_same_row(kept, states[count], row)


def test_a_state_takes_the_same_memory_whatever_the_length():
    config = changed_config("qwen3_5", 0)
    recurrent = dataclasses.replace(config, layers=config.layers[:1])
    sizes = [CacheSpec(1, n, "int8", "float32").nbytes(recurrent) for n in (256, 2**20)]
    (net,) = config.recurrences
    channels = 2 * net.key_heads * net.key_dim + net.value_heads * net.value_dim
    matrices = net.value_heads * net.key_dim * net.value_dim
    assert sizes == [4 * (matrices + (net.conv_width - 1) * channels)] * 2


def test_the_tensors_of_the_text_are_read_and_converted(tmp_path, caplog):
    folder = tmp_path / "hf"
    folder.mkdir()
    write_random_checkpoint(CONFIGS[IMAGES], folder)
    text = load_file(folder / "model.safetensors")
    beside = {name: np.ones(3, np.float32) for name in ("model.visual.pos.weight", "mtp.fc.weight")}
    save_file(text | beside, folder / "model.safetensors")
    found = flatten(load_parameters(folder, read_config(folder), make_mesh("model=2"), "bfloat16"))
    assert not caplog.text
    prefix = "model.language_model.layers.1.linear_attn"
    keys = 2 * 8 * 16  # queries and keys come first
    values = text[f"{prefix}.in_proj_qkv.weight"][keys:]
    np.testing.assert_array_equal(found["layers_1/delta_net/v/weight"], values.astype("bfloat16"))
    np.testing.assert_array_equal(found["layers_1/delta_net/A_log"], text[f"{prefix}.A_log"])
    convert_hf_to_orbax(folder, tmp_path / "orbax")
    convert_orbax_to_hf(tmp_path / "orbax", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == text.keys()
    for name, x in text.items():
        np.testing.assert_array_equal(back[name], x)


def test_what_recurrent_layers_do_not_go_with_is_refused():
    config = changed_config(DENSE, 0)
    with pytest.raises(UserError, match="cannot be split over context x model = 16"):
        check_fits_mesh(config, {"data": 1, "context": 4, "model": 4})
    with pytest.raises(UserError, match="streaming_llm does not go with recurrent layers"):
        lsjax.plan(config, "cpu:1", kv_compression="streaming_llm", max_input_length=100)
