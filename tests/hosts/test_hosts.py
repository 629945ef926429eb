"""Several processes run one model: the same tokens, and an end to waiting for who is not there."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
from helpers.processes import finish, free_port, start
from helpers.programs import ROOT, path_of, run

from lsjax.distributed.rendezvous import rendezvous
from lsjax.runtime.errors import UserError

PASSKEY = (ROOT / "examples" / "passkey_2048.txt").read_text()
# With the key at 66, and no more than fill some chunks of each device.
SHORT = PASSKEY[700:900] + PASSKEY[-100:]
SCALING = '--rope_scaling={"rope_type": "yarn", "factor": 4.5, ' + (
    '"original_max_position_embeddings": 512}'
)


def joined(count, *, flags=()):
    """Processes of four devices each that belong together."""
    address = f"localhost:{free_port()}"
    return [
        start(
            path_of("run_pa.py"),
            SCALING,
            f"--coordinator_address={address}",
            f"--num_processes={count}",
            f"--process_id={i}",
            "--coordinator_timeout=60",
            *flags,
            devices=4,
        )
        for i in range(count)
    ]


def token_ids(file):
    return [r["token_ids"] for r in json.loads(Path(file).read_text())["results"]]


@pytest.mark.slow("its parts are quick: eight devices of one process, and who calls and answers")
def test_two_processes_of_four_devices_say_what_one_process_says(tmp_path):
    """On all axes, where one process has one device."""
    prompts = (SHORT, "The door was open. The key of the house is")
    flags = ("--max_output_length=8", *(f"--input_texts={p}" for p in prompts))
    of_both = ("--mesh=data=2,context=2,model=2", f"--output_json={tmp_path / 'both.json'}")
    said = [finish(process) for process in joined(2, flags=(*of_both, *flags))]
    assert [one.returncode for one in said] == [0, 0], said
    done = run("run_pa.py", SCALING, *flags, f"--output_json={tmp_path / 'alone.json'}")
    assert "65415" in done.stdout
    assert token_ids(tmp_path / "both.json") == token_ids(tmp_path / "alone.json")
    assert "65415" in said[0].stdout and "prompt" in said[0].stdout  # one of them talks
    assert "65415" not in said[1].stdout and "prompt" not in said[1].stdout


def test_who_has_not_come_is_said_to_all():
    address, said = f"localhost:{free_port()}", []

    def call(number):
        with pytest.raises(UserError) as caught:
            rendezvous(address, 3, number, timeout=2)
        said.append(str(caught.value))

    threads = [threading.Thread(target=call, args=[number]) for number in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 2
    assert all("of 3 processes these have not come: 1;" in words for words in said)


@pytest.mark.slow("a mesh that is wrong for one process is refused by the same check")
def test_a_mesh_that_leaves_a_process_without_work_is_refused():
    for process in joined(2, flags=("--mesh=context=4", f"--input_texts={SHORT}")):
        said = finish(process, 60)
        assert "4 of the 8 devices that 2 processes bring" in said.stderr
        assert said.returncode == 2


def test_without_process_0_nobody_waits_for_ever():
    who = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2", "--process_id=1"]
    done = run("run_pa.py", *who, "--coordinator_timeout=2", f"--input_texts={SHORT}")
    assert "process 0 is not at localhost" in done.stderr
    assert done.returncode == 2


@pytest.mark.slow("that dead processes are noticed is JAX's; what is ours is one number")
def test_when_one_dies_the_other_ends_with_an_error():
    flags = (
        "--mesh=context=8",
        f"--input_texts={SHORT}",
        "--max_output_length=100000",
        "--ignore_eos",
        "--allow_untrained_length",
    )
    both = joined(2, flags=flags)
    said = ""
    while not said.endswith("654"):  # the answer, 65415, has begun
        assert both[0].poll() is None, both[0].stderr.read()
        said += both[0].stdout.read(1)
    both[0].send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert finish(both[1], 90).returncode not in (0, None)
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
    done = run("run_pa.py", f"--input_texts={SHORT}", *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
