"""The two programs, as they are run from a clone."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_checkpoints import make_tensors, write_folder
from safetensors.numpy import load_file

PROGRAMS = Path(__file__).parents[2] / "checkpoints_convert"


def run(program, **flags):
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return subprocess.run(
        [sys.executable, PROGRAMS / program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_and_back_with_a_progress_bar(tmp_path):
    tensors = make_tensors("GlmForCausalLM", "bfloat16")
    hf = write_folder(tmp_path / "hf", "GlmForCausalLM", tensors)
    there = run("hf_to_orbax.py", input_dir=hf, output_dir=tmp_path / "orbax")
    assert there.returncode == 0, there.stderr
    assert "100%" in there.stderr
    back = run("orbax_to_hf.py", input_dir=tmp_path / "orbax", output_dir=tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert "100%" in back.stderr
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert {n: t.tobytes() for n, t in found.items()} == {
        n: t.tobytes() for n, t in tensors.items()
    }


@pytest.mark.parametrize("program", ["hf_to_orbax.py", "orbax_to_hf.py"])
def test_what_is_wrong_is_one_sentence_and_exit_status_2(tmp_path, program):
    for flags, words in (
        ({"input_dir": tmp_path / "none", "output_dir": tmp_path / "out"}, "does not exist"),
        ({"input_dir": tmp_path}, "--output_dir"),
    ):
        done = run(program, **flags)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []
