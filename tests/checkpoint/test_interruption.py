"""A conversion that does not finish leaves nothing that loads, and touches nothing else."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import make_folder, mesh

from lsjax.checkpoint import (
    atomic_directory,
    convert_hf_to_orbax,
    convert_orbax_to_hf,
    load_parameters,
    orbax_checkpoint,
    safetensors_writer,
)
from lsjax.families import read_config
from lsjax.runtime.errors import UserError


@pytest.fixture
def hf(tmp_path):
    (tmp_path / "in").mkdir()
    return make_folder(tmp_path / "in" / "hf")


@pytest.fixture
def orbax(tmp_path, hf):
    convert_hf_to_orbax(hf, tmp_path / "in" / "orbax")
    return tmp_path / "in" / "orbax"


@pytest.fixture(params=["hf_to_orbax", "orbax_to_hf"])
def conversion(request, hf, orbax):
    """A conversion and its input."""
    if request.param == "hf_to_orbax":
        return convert_hf_to_orbax, hf
    return convert_orbax_to_hf, orbax


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def left_in(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "in")


def test_an_exception_leaves_nothing(tmp_path, conversion, out):
    convert, source = conversion

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, fail)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "conversion",
    ["hf_to_orbax", pytest.param("orbax_to_hf", marks=pytest.mark.slow("both make folders alike"))],
    indirect=True,
)
def test_a_kill_leaves_only_a_folder_that_is_refused(tmp_path, conversion, out):
    convert, source = conversion
    code = (
        "import os, signal, jax; jax.config.update('jax_platforms', 'cpu')\n"
        f"from lsjax.checkpoint import {convert.__name__} as convert\n"
        f"convert({str(source)!r}, {str(out)!r}, lambda _: os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    (name,) = left_in(tmp_path)
    assert name.startswith("out.incomplete-")
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path / name)
    with pytest.raises(UserError, match="interrupted"):
        load_parameters(tmp_path / name, read_config(source), mesh(), "float32")
    convert(source, out)
    load_parameters(out, read_config(out), mesh(), "float32")


def test_config_is_the_last_file_to_be_written(hf, out, monkeypatch):
    written = []
    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: (written.append(b), copy(a, b)))
    convert_hf_to_orbax(hf, out)
    assert [os.path.basename(path) for path in written][-1] == "config.json"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError(
            "RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']"
        ),
    ],
)
def test_a_disk_that_runs_full_is_reported_and_cleaned_up(tmp_path, hf, out, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(orbax_checkpoint.ocp.partial, "finalize", fail)
    with pytest.raises(UserError, match="ran full"):
        convert_hf_to_orbax(hf, out)
    assert left_in(tmp_path) == []


def test_a_disk_that_runs_full_within_a_safetensors_file(tmp_path, orbax, out, monkeypatch):
    def open_full(_, mode):
        return Path("/dev/full").open(mode)  # a device that is always full, for the disk

    monkeypatch.setattr(safetensors_writer, "open", open_full, raising=False)
    with pytest.raises(UserError, match="ran full"):
        convert_orbax_to_hf(orbax, out)
    assert left_in(tmp_path) == []


def test_a_disk_that_is_too_small_is_refused_with_both_figures(
    tmp_path, conversion, out, monkeypatch
):
    convert, source = conversion
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10_000_000, 10_000)
    monkeypatch.setattr(atomic_directory.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"will take 0\.\d+ GB.* has 0\.\d+ GB free"):
        convert(source, out)
    assert left_in(tmp_path) == []


def test_a_folder_in_use_is_refused_and_kept(conversion, out):
    convert, source = conversion
    out.mkdir()
    (out / "notes").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        convert(source, out)
    assert [(f.name, f.read_text()) for f in out.iterdir()] == [("notes", "mine")]


def test_an_empty_folder_is_taken(conversion, out):
    convert, source = conversion
    out.mkdir()
    convert(source, out)
    load_parameters(out, read_config(out), mesh(), "float32")


def test_a_faulty_input_makes_no_folder(tmp_path, hf, out):
    (hf / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        convert_hf_to_orbax(hf, out)
    assert left_in(tmp_path) == []


def test_each_conversion_refuses_the_other_kind_of_folder(hf, orbax, out):
    with pytest.raises(UserError, match="converted already"):
        convert_hf_to_orbax(orbax, out)
    with pytest.raises(UserError, match="not a converted folder"):
        convert_orbax_to_hf(hf, out)
