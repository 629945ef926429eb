"""A run that is stopped, or killed, ends as if it had never been."""

import json
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from runs import command, environment, log, losses, run
from safetensors.numpy import load_file

import lsjax

STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


def flags(folder, name):
    return ["--steps", STEPS, "--save_every", 4, "--keep", 2, "--output_dir", folder / name]


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nobody stops, with what it is to be compared to."""
    held_out = ["--eval_data", folder / "data.jsonl", "--eval_lengths", "16,32"]
    done = run(folder, *flags(folder, "whole"), *held_out)
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def interrupted(folder, name, number):
    """A run that gets a signal once it has written a checkpoint and gone on."""
    process = subprocess.Popen(
        command(folder, *flags(folder, name)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    saved = folder / name / "checkpoints" / "4"
    while not saved.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def weights(run_folder):
    return load_file(run_folder / "model" / "model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_goes_on_is_the_same_bit_for_bit(folder, whole, number):
    name = number.name
    status, out, errors = interrupted(folder, name, number)
    if number == signal.SIGTERM:
        assert status == 128 + number, errors
        assert "SIGTERM: everything is saved" in out
        reached = max(losses(folder / name))
        assert (folder / name / "checkpoints" / str(reached)).exists() and reached < STEPS
    else:
        assert status == -number
    assert not (folder / name / "model").exists()
    done = run(folder, *flags(folder, name))
    assert done.returncode == 0, done.stderr
    assert losses(folder / name) == losses(whole)
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    expected, found = weights(whole), weights(folder / name)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[k], found[k]) for k in expected)


def test_the_folder_holds_what_a_user_looks_for(whole):
    kept = sorted(int(p.name) for p in (whole / "checkpoints").iterdir())
    assert kept == [28, 30]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    found = losses(whole)
    assert np.mean([found[i] for i in range(26, 31)]) < found[1]
    first, *_, last = [line["eval_losses"] for line in log(whole) if "eval_losses" in line]
    assert first.keys() == {"16", "32"} and all(last[n] < first[n] for n in first)


def test_the_exported_model_loads_and_has_the_loss_that_was_logged(whole, folder):
    lm = lsjax.load(whole / "model")
    documents = [json.loads(line)["ids"] for line in (folder / "data.jsonl").open()]
    # A document of exactly 32 tokens has one target less.
    found = [lm.losses([ids[:33]])[0] for ids in documents if len(ids) >= 32]
    logged = [line["eval_losses"]["32"] for line in log(whole) if "eval_losses" in line][-1]
    assert np.mean(np.concatenate(found)) == pytest.approx(logged, rel=1e-5)
    assert jax.tree.leaves(lm.params)[0].dtype == "float32"


def test_a_run_made_longer_has_the_model_of_all_its_steps(folder):
    given = ["--schedule", "constant", "--output_dir", folder / "longer"]
    found = []
    for steps in (2, 3):
        done = run(folder, "--steps", steps, *given)
        assert done.returncode == 0, done.stderr
        found.append(weights(folder / "longer")["model.norm.weight"])
    assert not np.array_equal(*found)


def test_settings_that_weights_depend_on_must_stay(folder, whole):
    done = run(folder, *flags(folder, "whole"), "--seed", 1, "--weight_decay", 0.5)
    assert done.returncode == 2
    assert "other settings (seed was 0; weight_decay was 0.1)" in done.stderr
    done = run(folder, *flags(folder, "whole"), "--save_every", 5)
    assert done.returncode == 0 and "done: the model is in" in done.stdout
