"""What scripts/train.py refuses, and how, before a weight is read."""

import json
import sys

import jax.numpy as jnp
import optax
import pytest
from helpers.processes import finish, start
from helpers.programs import path_of
from helpers.training_runs import CONFIG, train

from lsjax import shipped_model_path
from lsjax.cli.program import import_extra
from lsjax.families import parse_config
from lsjax.positions.scaling import override_rope_scaling
from lsjax.runtime.errors import UserError
from lsjax.training.config import DataConfig, LoggingConfig, find_model_source, resolve_training
from lsjax.training.optimizer import OptimizerConfig, learning_rates, make_optimizer
from lsjax.training.scaled_config import scaled_config

YARN = '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}'
WATCH = LoggingConfig(1, 1, 1, 0, (), ())


def resolved(rope_scaling=None, logging=WATCH, mesh="", steps=10, warmup_steps=0, **changed):
    data = dict(
        data=(),
        seq_length=512,
        batch_size=2,
        gradient_accumulation_steps=1,
        pose_max_position=512,
        seed=0,
    )
    return resolve_training(
        find_model_source(shipped_model_path(), None, None, rope_scaling),
        DataConfig(**data | changed),
        OptimizerConfig(steps, 1e-3, warmup_steps),
        logging,
        dtype="auto",
        mesh=mesh,
        output_dir="",
    )


def test_a_program_without_what_it_needs_says_so_in_a_sentence(tmp_path):
    done = train(tmp_path, "--output_dir", tmp_path / "out")
    assert (done.returncode, done.stderr) == (2, "error: give the number of --steps.\n")
    done = train(tmp_path, "--output_dir", tmp_path, "--steps", 2)
    assert done.returncode == 2 and "holds other files" in done.stderr
    done = train(tmp_path, "--recipe", "passkey", "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and "leave out --config, --data, --learning_rate" in done.stderr


@pytest.mark.slow("one handler is for all programs, and others are run as processes quickly")
def test_as_a_process_it_ends_with_the_same_sentence(tmp_path):
    ended = finish(start(path_of("train.py"), "--output_dir", tmp_path / "out"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: give the number of --steps.\n"


def test_a_length_beyond_what_the_model_serves_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r'reaches 1024 .* serves 512 .*"yarn", "factor": 2\.0'):
        resolved(seq_length=1024, pose_max_position=1024)
    with pytest.raises(UserError, match=r"reaches 2048 .* serves 512"):
        resolved(pose_max_position=2048)
    with pytest.raises(UserError, match=r"reaches 4096 .* serves 2048"):
        resolved(YARN, LoggingConfig(1, 1, 1, 0, ("x",), (4096,)))
    assert resolved(YARN, pose_max_position=2048).source.config.served_length == 2048


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pose_max_position": 256}, "at least seq_length = 512, not 256"),
        ({"mesh": "data=4"}, "batch_size must be a multiple of data=4, not 2"),
        (
            {"mesh": "context=8", "seq_length": 24, "pose_max_position": 24},
            "seq_length must be a multiple of 16",
        ),
        ({"warmup_steps": 10}, "fewer than the 10 steps"),
        ({"rope_scaling": "auto"}, "trained with one scaling"),
    ],
)
def test_settings_that_do_not_go_together(wrong, message):
    with pytest.raises(UserError, match=message):
        resolved(**wrong)


@pytest.mark.parametrize(
    "block", [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
@pytest.mark.parametrize("scaling", [None, "off", YARN, '{"type": "linear", "factor": 2}'])
def test_the_exported_config_says_the_scaling_that_was_trained(block, scaling):
    raw = CONFIG | block
    said, config = scaled_config(raw, scaling)
    assert parse_config(said) == config == override_rope_scaling(parse_config(raw), scaling)
    assert set(said) <= set(raw) | {"rope_scaling"}


def test_a_model_with_dual_chunk_attention_is_trained_as_far_as_plain_rotation_reaches():
    block = {"chunk_size": 512, "local_size": 64}
    raw = CONFIG | {"dual_chunk_attention_config": block, "max_position_embeddings": 4096}
    said, config = scaled_config(raw, "off")
    assert parse_config(said) == config and config.served_length == 512
    with pytest.raises(UserError, match="up to 512 tokens"):
        resolved(json.dumps(block | {"rope_type": "dual_chunk"}), pose_max_position=1024)


def test_learning_rates_rise_and_fall():
    for schedule, middle in (("cosine", 0.5), ("linear", 0.5), ("constant", 1)):
        rate = learning_rates(OptimizerConfig(30, 1.0, 10, schedule))
        found = [float(rate(step)) for step in (0, 5, 10, 20)]
        assert found == pytest.approx([0, 0.5, 1, middle], abs=1e-6)
        assert float(rate(30)) == pytest.approx(float(schedule == "constant"), abs=1e-6)
    assert float(learning_rates(OptimizerConfig(3, 1.0, 0))(0)) == 1


def test_only_matrices_decay():
    adamw = make_optimizer(OptimizerConfig(10, 0.1, 0, weight_decay=1.0))
    params = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    updates, _ = adamw.update(optax.tree.zeros_like(params), adamw.init(params), params)
    assert updates["matrix"].mean() == pytest.approx(-0.1) and not updates["norm"].any()


def test_what_is_not_installed_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(UserError, match=r"needs optax, .*pip install 'lsjax\[train\]'"):
        import_extra("train", "optax")
