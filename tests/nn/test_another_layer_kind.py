"""A recurrence and an MLP of these tests' own: the library runs what describes itself."""

import dataclasses
import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.golden_models import CONFIGS, changed_config

import lsjax
from lsjax import UserError
from lsjax.cache import CacheSpec, RecurrentState, empty_state
from lsjax.config import LayerKind, StateArray
from lsjax.distributed.sequence_layout import ONE_DEVICE
from lsjax.distributed.sharding import check_fits_mesh, make_mesh
from lsjax.inference.options import Options
from lsjax.nn import layer_modules
from lsjax.nn.linear import Linear
from lsjax.nn.parameters import abstract_parameters, random_parameters
from lsjax.planning.arithmetic import active_weight_bytes
from lsjax.positions.rotary import rotary_tables
from lsjax.runtime.flops import prefill_cost


@dataclasses.dataclass(frozen=True)
class Average:
    """A running average of values of each token."""

    heads: int = 2
    width: int = 8

    name = "average"
    float_weights = ("v/weight",)

    @property
    def state(self):
        return {"mean": StateArray((self.heads, self.width), 0, "float32")}

    @property
    def split(self):
        return {"averages": self.heads}

    @property
    def matrix_rows(self):
        return 2 * self.heads * self.width

    @property
    def operations(self):
        return 3.0 * self.heads * self.width

    @property
    def held_bytes(self):
        return 8.0 * self.heads * self.width


class AverageModule(nn.Module):
    net: Average
    config: lsjax.ModelConfig
    mesh: jax.sharding.Mesh

    @nn.compact
    def __call__(self, x, inputs, state):
        net, (batch, length, hidden) = self.net, x.shape
        v = Linear(net.heads * net.width, ("kv_heads", "embed"), name="v")(x)
        v = v.reshape(batch, length, net.heads, net.width).astype(jnp.float32)
        real = jnp.ones((batch, length), bool)
        if inputs.lengths is not None:
            real = inputs.positions < inputs.lengths[:, None]
        held = state or empty_state(net, batch, x.dtype, ONE_DEVICE)
        y, after = averages(held, v, real)
        if inputs.decode and length > 1:
            after = held.replace(draft=v)
        y = y.reshape(batch, length, -1).astype(x.dtype)
        return Linear(hidden, ("embed", "heads"), name="o")(y), state and after

    @staticmethod
    def keep_accepted(state, counts):
        kept = jnp.arange(state.draft.shape[1]) < counts[:, None]
        return averages(state, state.draft, kept)[1]


def averages(state: RecurrentState, v, real):
    def step(mean, token):
        v, real = token
        mean = jnp.where(real[:, None, None], 0.8 * mean + v, mean)
        return mean, mean

    mean, y = jax.lax.scan(step, state.arrays["mean"], (v.swapaxes(0, 1), real.T))
    return y.swapaxes(0, 1), state.replace(arrays={"mean": mean}, draft=None)


@dataclasses.dataclass(frozen=True)
class Squares:
    """An MLP of two matrices, of which a step reads half of the second one."""

    width: int = 24

    float_weights = ()
    multiplies_at_once = False

    @property
    def split(self):
        return {"squares": self.width}

    @property
    def matrix_rows(self):
        return 2 * self.width

    def held_channels(self, hidden_size, model):
        return self.width / model

    def share_read(self, name, tokens):
        return 0.5 if name == "out/weight" else 1.0


class SquaresModule(nn.Module):
    mlp: Squares
    mesh: jax.sharding.Mesh

    takes_scaled = False

    @nn.compact
    def __call__(self, x, decode):
        y = nn.relu(Linear(self.mlp.width, ("mlp", "embed"), name="in")(x)) ** 2
        return Linear(x.shape[-1], ("embed", "mlp"), name="out")(y)


@pytest.fixture(autouse=True)
def _modules():
    recurrences = mock.patch.dict(layer_modules._RECURRENCES, {Average: AverageModule})
    with recurrences, mock.patch.dict(layer_modules._MLPS, {Squares: SquaresModule}):
        yield


def config_of():
    kinds = LayerKind(None, Squares(), Average()), LayerKind()
    return dataclasses.replace(changed_config("qwen3", 0), layers=kinds)


@functools.cache
def params_of():
    random = random_parameters(config_of(), make_mesh(""), "float32")
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, random)


def model(chunk=64):
    options = Options(
        folder=str(CONFIGS["qwen3"].parent),
        config=config_of(),
        mesh=make_mesh(""),
        dtype="float32",
        kv_cache_dtype="float32",
        prefill_chunk=chunk,
        eos_token_ids=frozenset(),
    )
    return lsjax.LanguageModel(options, params_of())


def ids(length):
    return np.random.default_rng(length).integers(0, 90, length).tolist()


def test_what_it_says_of_itself_is_counted():
    config, mesh = config_of(), make_mesh("")
    hidden, dense = config.hidden_size, dataclasses.replace(config, layers=config.layers[1:])
    both = [CacheSpec(3, 256, "float32", "float32").nbytes(x) for x in (config, dense)]
    assert both[0] - both[1] == 3 * 2 * 8 * 4
    assert prefill_cost(config, 0, 1) - prefill_cost(dense, 0, 1) == 2 * hidden * (32 + 48) + 48
    matrices = 2 * 16 * hidden + 2 * 24 * hidden - 24 * hidden // 2
    (read, _), _ = active_weight_bytes(config, mesh, "float32", "auto", 1)
    assert read == 4 * (matrices + 2 * hidden)  # two norms
    stored = abstract_parameters(config, mesh, "bfloat16", "int8")
    names = ("average/v", "average/o", "mlp/in", "mlp/out")
    dtypes = [stored[f"layers_0/{name}/weight"].dtype.name for name in names]
    assert dtypes == ["bfloat16", "int8", "int8", "int8"]
    with pytest.raises(UserError, match="the 2 averages of the model's recurrent layers"):
        check_fits_mesh(config, {"context": 3, "model": 1})
    only = dataclasses.replace(
        config, num_heads=5, num_kv_heads=5, layers=(LayerKind(None, Squares()),)
    )
    with pytest.raises(UserError, match="the model's 24 squares cannot be split"):
        check_fits_mesh(only, {"model": 5})


def test_logits_in_chunks_are_those_of_the_whole_row():
    prompt, lm = ids(40), model(chunk=16)
    tables, decoder = rotary_tables(lm.config, [40]), lm.engine.decoder

    @jax.jit
    def whole(params, tokens):
        hidden, _ = decoder.apply({"params": params}, tokens, jnp.arange(40)[None], tables, None)
        return decoder.apply({"params": params}, hidden, method="logits")

    found = lm.logits([prompt])[0]
    np.testing.assert_allclose(found, whole(params_of(), jnp.array([prompt]))[0], atol=1e-4)


@pytest.mark.slow("three more programs; drafts and documents are quick with Gated DeltaNet")
def test_drafts_and_documents_give_the_tokens_of_the_plain_prompt(tmp_path):
    lm, document, question = model(), ids(90) * 2, ids(20)
    (plain,) = lm.generate([document + question], 12)
    (drafted,) = lm.generate([document + question], 12, prompt_lookup_num_tokens=4)
    assert drafted.token_ids == plain.token_ids
    lm.read(document, save_to=tmp_path / "saved")
    (found,) = lm.generate([question], 12, document=lm.open_document(tmp_path / "saved"))
    assert found.token_ids == plain.token_ids
