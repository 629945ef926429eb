"""Mixtures of experts: against transformers' logits, and against all experts run on all tokens."""

import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.golden_models import CONFIGS, build, golden_logits, mesh_of
from helpers.tiny_models import documents, in_parts, parameters, tiny
from safetensors.numpy import load_file, save_file

from lsjax import UserError
from lsjax.checkpoint import convert_hf_to_orbax, convert_orbax_to_hf, load_parameters
from lsjax.checkpoint.random_weights import write_random_checkpoint
from lsjax.config import LayerKind
from lsjax.distributed.sharding import check_fits_mesh, make_mesh
from lsjax.families import parse_config, read_config
from lsjax.families.qwen_moe import Experts
from lsjax.nn.decoder import Decoder
from lsjax.nn.experts import MixtureOfExperts, choose_experts
from lsjax.nn.parameters import flatten
from lsjax.runtime.flops import prefill_cost
from lsjax.training.loss import ChunkSizes
from lsjax.training.step import Trainer

NAMES = ("qwen3_moe", "qwen3_moe_dense_layers")
EXPERTS = Experts(count=8, per_token=2, width=24, renormalized=True, balance_weight=0.5)
slow = functools.partial(pytest.param, marks=pytest.mark.slow("a chunk of 7 and decode are quick"))


@pytest.mark.parametrize(
    ("name", "chunk", "mesh"),
    [
        ("qwen3_moe_dense_layers", 7, "111"),
        *(slow("qwen3_moe", chunk, "111") for chunk in (1, 80)),
        *(slow(NAMES[i % 2], 24, mesh) for i, mesh in enumerate(("121", "141", "124", "212"))),
        slow("qwen3_moe", 24, "222"),
    ],
)
def test_logits_are_those_of_transformers(name, chunk, mesh):
    data = golden_logits(name)
    found = build(name, chunk=chunk, mesh=mesh_of(mesh)).logits(data["tokens"].tolist())
    found = np.stack(found)[:, data["positions"]]
    np.testing.assert_allclose(found, data["logits"], rtol=0, atol=1e-4)


def greedy(prompts, **options):
    done = build("qwen3_moe_dense_layers", **options).generate(
        prompts, 12, allow_untrained_length=True, max_input_length=100
    )
    return [c.token_ids for c in done]


@pytest.mark.slow("logits in chunks and on a mesh are quick")
def test_tokens_depend_on_the_prompt_alone():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 96, n).tolist() for n in (70, 5, 37)]
    alone = [greedy([p])[0] for p in prompts]
    assert greedy(prompts, chunk=16, segment=1) == alone
    assert greedy(prompts[:2], mesh=mesh_of("222")) == alone[:2]
    lm, ids = build("qwen3_moe_dense_layers"), list(prompts[0])
    for _ in range(6):
        ids.append(int(lm.logits([ids])[0][-1].argmax()))
    assert tuple(ids[-6:]) == tuple(alone[0][:6])
    in_int8 = greedy(prompts, weight_dtype="int8")
    assert greedy(prompts, weight_dtype="int8", mesh=mesh_of("122")) == in_int8


@pytest.mark.slow("documents are quick with dense layers; experts see tokens one by one")
def test_a_saved_document_gives_the_tokens_of_the_whole_prompt(tmp_path):
    rng = np.random.default_rng(0)
    document, question = (rng.integers(0, 96, n).tolist() for n in (70, 5))
    build("qwen3_moe").read(document, save_to=tmp_path / "saved")
    lm = build("qwen3_moe", mesh=mesh_of("122"))
    (found,) = lm.generate([question], 12, document=lm.open_document(tmp_path / "saved"))
    (whole,) = build("qwen3_moe").generate([document + question], 12)
    assert found.token_ids == whole.token_ids


def test_of_equal_experts_the_first_are_chosen():
    weights, chosen = choose_experts(EXPERTS, jnp.array([0.1, 0.3, 0.1, 0.3, 0.3]))
    assert chosen.tolist() == [1, 3]
    np.testing.assert_allclose(weights, [0.5, 0.5])


def with_experts():
    """A tiny model whose first layer has experts, and whose second has none."""
    kinds = LayerKind(mlp=EXPERTS), LayerKind(11)
    return dataclasses.replace(tiny("rotary"), layers=kinds)


def all_experts(router, gate, up, down, x):
    """Runs all experts on all tokens; returns their sum, the probabilities and who is chosen."""
    probabilities = jax.nn.softmax(x @ router.T)
    top = jnp.sort(probabilities)[..., -EXPERTS.per_token, None]
    chosen = probabilities >= top
    share = jnp.where(chosen, probabilities, 0)
    share = share / share.sum(-1, keepdims=True)
    inner = jax.nn.silu(jnp.einsum("blh,eih->blei", x, gate)) * jnp.einsum("blh,eih->blei", x, up)
    return jnp.einsum("blei,ehi,ble->blh", inner, down, share), probabilities, chosen


def plain_loss(config, tables, params, batch):
    seen = []

    def call(self, x, decode=False):
        names, p = ("gate", "up", "down"), self.variables["params"]
        weights = [p["router"]["weight"], *(p[name]["weight"] for name in names)]
        y, probabilities, chosen = all_experts(*weights, x)
        f, mean = chosen.mean((0, 1)), probabilities.mean((0, 1))
        seen.append(EXPERTS.count * jnp.sum(f * mean))
        return y

    decoder = Decoder(config, make_mesh(""), np.dtype("float32"))
    args = batch.tokens, batch.positions, tables, None, None, False, batch.begin
    with mock.patch.object(MixtureOfExperts, "__call__", call), jax.disable_jit():
        hidden, _ = decoder.apply({"params": params}, *args)
    logits = decoder.apply({"params": params}, hidden, method="logits")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    mean = (losses * batch.weights).sum() / batch.weights.sum()
    return mean + EXPERTS.balance_weight * sum(seen)


@pytest.mark.slow("half a minute of compiling; what routes and runs is that of prefill, quick")
def test_training_has_the_gradients_of_all_experts_run_plainly():
    mesh, config, batch = "context=2,model=2", with_experts(), documents(1, 32)
    t = Trainer(config, make_mesh(mesh), optax.sgd(1.0), "float32", ChunkSizes(mlp=12, logits=16))
    before = jax.device_get(flatten(parameters(config, mesh)))
    state, metrics = t.step(t.init(parameters(config, mesh)), in_parts(batch, 1), t.tables(32))
    of = jax.value_and_grad(functools.partial(plain_loss, config, jax.device_get(t.tables(32))))
    wanted, grads = of(jax.device_get(parameters(config)), batch)
    assert float(metrics.loss) == pytest.approx(float(wanted), rel=1e-5)
    after = jax.device_get(flatten(state.params))
    for name, grad in flatten(grads).items():
        room = 5e-5 * np.abs(grad).max() + 1e-6
        np.testing.assert_allclose(
            before[name] - after[name], grad, rtol=0, atol=room, err_msg=name
        )


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "hf"
    path.mkdir()
    write_random_checkpoint(CONFIGS["qwen3_moe_dense_layers"], path)
    return path


def test_fused_and_single_tensors_are_one_model(folder, tmp_path):
    config = read_config(folder)
    tensors = load_file(folder / "model.safetensors")
    found = flatten(load_parameters(folder, config, make_mesh("model=2"), "float32"))
    for layer in (3,):  # the others are dense
        path = f"model.layers.{layer}.mlp.experts."
        of = {
            p: np.stack([tensors.pop(f"{path}{i}.{p}_proj.weight") for i in range(12)])
            for p in ("gate", "up", "down")
        }
        for p, x in of.items():
            np.testing.assert_array_equal(found[f"layers_{layer}/mlp/{p}/weight"], x)
        tensors[path + "gate_up_proj"] = np.concatenate([of["gate"], of["up"]], axis=1)
        tensors[path + "down_proj"] = of["down"]
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, fused / "model.safetensors")
    again = flatten(load_parameters(fused, config, make_mesh(""), "float32"))
    for name, x in found.items():
        np.testing.assert_array_equal(again[name], x)


def test_converted_and_back_the_tensors_are_the_same(folder, tmp_path):
    convert_hf_to_orbax(folder, tmp_path / "orbax")
    convert_orbax_to_hf(tmp_path / "orbax", tmp_path / "back")
    wanted, found = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert wanted.keys() == found.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name], x)


def test_operations_are_those_of_the_chosen_experts():
    config = read_config(CONFIGS["qwen3_moe"])
    dense = [
        dataclasses.replace(config, intermediate_size=size, layers=(LayerKind(),) * 2)
        for size in (4 * 16, 4 * 16 + 8)
    ]
    low, high = (prefill_cost(c, 0, 64) for c in dense)  # the router is 16 vectors, under 3 * 8
    assert low < prefill_cost(config, 0, 64) < high


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 17}, "17 experts per token out of 16"),
        ({"mlp_only_layers": [9]}, "'mlp_only_layers' must hold indices"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, said):
    raw = json.loads(CONFIGS["qwen3_moe"].read_text())
    with pytest.raises(UserError, match=said):
        parse_config(raw | changes)


def test_experts_that_cannot_be_split_are_refused():
    config = dataclasses.replace(
        read_config(CONFIGS["qwen3_moe"]),
        layers=(LayerKind(mlp=dataclasses.replace(EXPERTS, count=6)),),
    )
    with pytest.raises(UserError, match="6 experts cannot be split over model=4"):
        check_fits_mesh(config, {"data": 1, "context": 1, "model": 4})
