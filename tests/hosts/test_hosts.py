"""Several processes run one model: the same tokens, and an end to waiting for who is not there."""

import json
import signal
import time
from pathlib import Path

import processes
import pytest

RUN_PA = processes.ROOT / "scripts" / "run_pa.py"
PASSKEY = processes.ROOT / "examples" / "passkey_2048.txt"
YARN = '{"rope_type": "yarn", "factor": 4.5, "original_max_position_embeddings": 512}'


def start(devices, *flags):
    return processes.start(devices, RUN_PA, "--rope_scaling", YARN, *flags)


def joined(count, *, missing=(), timeout=60, flags=()):
    """Processes of four devices each that belong together."""
    address = f"localhost:{processes.free_port()}"
    return [
        start(
            4,
            f"--coordinator_address={address}",
            f"--num_processes={count}",
            f"--process_id={i}",
            f"--coordinator_timeout={timeout}",
            *flags,
        )
        for i in range(count)
        if i not in missing
    ]


def token_ids(file):
    return [r["token_ids"] for r in json.loads(Path(file).read_text())["results"]]


@pytest.mark.parametrize(
    "flags",
    [
        ("--mesh=context=8", "--kv_cache_dtype=int8"),
        ("--mesh=data=2,context=2,model=2", "--prompt_lookup_num_tokens=3"),
    ],
    ids=str,
)
def test_two_processes_of_four_devices_say_what_one_of_eight_says(flags, tmp_path):
    prompts = (PASSKEY.read_text(), "The door was open. The key of the house is")
    flags = (*flags, "--max_output_length=12", *(f"--input_texts={p}" for p in prompts))
    alone = start(8, *flags, f"--output_json={tmp_path / 'alone.json'}")
    assert "65415" in alone.communicate(timeout=300)[0]
    both = joined(2, flags=(*flags, f"--output_json={tmp_path / 'both.json'}"))
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert token_ids(tmp_path / "both.json") == token_ids(tmp_path / "alone.json")
    assert "65415" in said[0][0] and "prompt" in said[0][0]  # one of them talks
    assert "65415" not in said[1][0] and "prompt" not in said[1][0]


def test_who_has_not_come_is_said_to_all(tmp_path):
    flags = ("--mesh=context=8", f"--input_texts={PASSKEY}")
    for process in joined(3, missing=(1,), timeout=6, flags=flags):
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 2
        assert "of 3 processes these have not come: 1" in said and len(said.splitlines()) == 1


def test_a_mesh_that_leaves_a_process_without_work_is_refused():
    for process in joined(2, flags=("--mesh=context=4", f"--input_texts={PASSKEY}")):
        assert "4 of the 8 devices that 2 processes bring" in process.communicate(timeout=60)[1]
        assert process.returncode == 2


def test_without_process_0_nobody_waits_for_ever():
    (process,) = joined(2, missing=(0,), timeout=2, flags=(f"--input_texts={PASSKEY}",))
    assert "process 0 is not at localhost" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_dies_the_other_ends_with_an_error(victim):
    flags = (
        "--mesh=context=8",
        f"--input_texts={PASSKEY}",
        "--max_output_length=1000000",
        "--ignore_eos",
        "--allow_untrained_length",
    )
    both = joined(2, flags=flags)
    said = ""
    while not said.endswith("654"):  # the answer, 65415, has begun
        assert both[0].poll() is None, both[0].stderr.read()
        said += both[0].stdout.read(1)
    both[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    other = both[1 - victim]
    other.communicate(timeout=90)
    assert other.returncode not in (0, None)
    assert time.monotonic() - began < 90


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_processes=2"], "go with coordinator_address"),
        (["--coordinator_address=here", "--num_processes=2", "--process_id=0"], "host:port"),
        (["--coordinator_address=here:1", "--num_processes=2"], "give all three"),
        (["--coordinator_address=auto", "--num_processes=2"], "leave them out"),
        (["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"], "from 0 to"),
    ],
)
def test_flags_that_do_not_go_together(flags, words):
    process = start(1, f"--input_texts={PASSKEY}", *flags)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and words in said and len(said.splitlines()) == 1
