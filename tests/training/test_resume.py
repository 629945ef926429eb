"""A run that is stopped, or killed, ends as if it had never been."""

import json
import signal
import time

import jax
import numpy as np
import pytest
from helpers.processes import finish, start
from helpers.programs import path_of
from helpers.training_runs import arguments, log, losses, train
from safetensors.numpy import load_file

import lsjax
from lsjax.training.packing import Packer

STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


def flags(folder, name):
    return [
        "--steps",
        STEPS,
        "--save_every",
        10,
        "--keep_checkpoints",
        2,
        "--output_dir",
        folder / name,
    ]


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nobody stops, with what it is to be compared to."""
    held_out = ["--eval_data", folder / "data.jsonl", "--eval_lengths", "16,32"]
    done = train(folder, *flags(folder, "whole"), *held_out)
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def interrupted(folder, name, number):
    """A process that gets a signal once it has written a checkpoint and gone on."""
    process = start(path_of("train.py"), *arguments(folder, *flags(folder, name)))
    saved = folder / name / "checkpoints" / "10"
    while not saved.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    return finish(process)


def assert_same_run(found, expected):
    assert losses(found) == losses(expected)
    assert list(losses(expected)) == list(range(1, STEPS + 1))
    wanted, tensors = weights(expected), weights(found)
    assert wanted.keys() == tensors.keys()
    assert all(np.array_equal(wanted[k], tensors[k]) for k in wanted)


def weights(run_folder):
    return load_file(run_folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=pytest.mark.slow("a step's end is quick, in this process"))
        for number in (signal.SIGTERM, signal.SIGKILL)
    ],
)
def test_a_run_that_goes_on_is_the_same_bit_for_bit(folder, whole, number):
    name = number.name
    ended = interrupted(folder, name, number)
    if number == signal.SIGTERM:
        assert ended.returncode == 128 + number, ended.stderr
        assert "SIGTERM: everything is saved" in ended.stdout
        reached = max(losses(folder / name))
        assert (folder / name / "checkpoints" / str(reached)).exists() and reached < STEPS
    else:
        assert ended.returncode == -number
    assert not (folder / name / "model").exists()
    done = train(folder, *flags(folder, name))
    assert done.returncode == 0, done.stderr
    assert_same_run(folder / name, whole)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow("one handler is for both")),
    ],
)
def test_a_signal_lets_the_step_end_and_everything_be_saved(folder, whole, monkeypatch, number):
    run_folder = folder / f"asked-{number.name}"
    take, calls = Packer.take, []

    def take_and_ask(*given):
        calls.append(given)
        if len(calls) == 6:  # during step 5: the first batch is taken before a step
            signal.raise_signal(number)
        return take(*given)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Packer, "take", take_and_ask)
        ended = train(folder, *flags(folder, run_folder.name))
    assert ended.returncode == 128 + number, ended.stderr
    assert f"{number.name}: everything is saved" in ended.stdout
    assert signal.getsignal(number) == before
    assert list(losses(run_folder)) == [1, 2, 3, 4, 5]
    assert (run_folder / "checkpoints" / "5").exists()
    assert not (run_folder / "model").exists()
    done = train(folder, *flags(folder, run_folder.name))
    assert done.returncode == 0, done.stderr
    assert_same_run(run_folder, whole)


def test_the_folder_holds_what_a_user_looks_for(whole):
    kept = sorted(int(p.name) for p in (whole / "checkpoints").iterdir())
    assert kept == [20, 30]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    found = losses(whole)
    assert np.mean([found[i] for i in range(26, 31)]) < found[1]
    first, *_, last = [line["eval_losses"] for line in log(whole) if "eval_losses" in line]
    assert first.keys() == {"16", "32"} and all(last[n] < first[n] for n in first)


def test_the_exported_model_loads_and_has_the_loss_that_was_logged(whole, folder):
    lm = lsjax.load(whole / "model")
    documents = [json.loads(line)["ids"] for line in (folder / "data.jsonl").open()]
    # A document of exactly 32 tokens has one target less.
    found = [lm.token_nll([ids[:33]])[0] for ids in documents if len(ids) >= 32]
    logged = [line["eval_losses"]["32"] for line in log(whole) if "eval_losses" in line][-1]
    assert np.mean(np.concatenate(found)) == pytest.approx(logged, rel=1e-5)
    assert jax.tree.leaves(lm.params)[0].dtype == "float32"


@pytest.mark.slow("a run that goes on is quick")
def test_a_run_made_longer_has_the_model_of_all_its_steps(folder):
    given = ["--schedule", "constant", "--output_dir", folder / "longer"]
    found = []
    for steps in (2, 3):
        done = train(folder, "--steps", steps, *given)
        assert done.returncode == 0, done.stderr
        found.append(weights(folder / "longer")["model.norm.weight"])
    assert not np.array_equal(*found)


def test_settings_that_weights_depend_on_must_stay(folder, whole):
    done = train(folder, *flags(folder, "whole"), "--seed", 1, "--weight_decay", 0.5)
    assert done.returncode == 2
    assert "other settings (seed was 0; weight_decay was 0.1)" in done.stderr
    done = train(folder, *flags(folder, "whole"), "--save_every", 5)
    assert done.returncode == 0 and "done: the model is in" in done.stdout
