"""The two programs, as they are run from a clone."""

import pytest
from helpers.checkpoints import make_tensors, write_folder
from helpers.processes import finish, start
from helpers.programs import path_of, run
from safetensors.numpy import load_file


def convert(program, **flags):
    return run(program, *(f"--{name}={value}" for name, value in flags.items()))


def test_there_and_back_with_a_progress_bar(tmp_path):
    tensors = make_tensors("GlmForCausalLM", "bfloat16")
    hf = write_folder(tmp_path / "hf", "GlmForCausalLM", tensors)
    there = convert("hf_to_orbax.py", input_dir=hf, output_dir=tmp_path / "orbax")
    assert there.returncode == 0, there.stderr
    assert "100%" in there.stderr
    back = convert("orbax_to_hf.py", input_dir=tmp_path / "orbax", output_dir=tmp_path / "back")
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
        done = convert(program, **flags)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_as_a_process_it_ends_with_the_same_sentence(tmp_path):
    given = [f"--input_dir={tmp_path / 'none'}", f"--output_dir={tmp_path / 'out'}"]
    done = finish(start(path_of("hf_to_orbax.py"), *given))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "does not exist" in done.stderr
