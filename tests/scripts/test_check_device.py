"""The device check: a wrong kernel is found out, and no phase takes another down."""

import os
import sys

from helpers.programs import run

from lsjax.attention.dispatch import attend, attend_to_kept
from lsjax.cli.device_check.kept_blocks import check_kept
from lsjax.cli.device_check.kernels import Case, Way, check
from lsjax.cli.device_check.phases import Ended, run_logged
from lsjax.cli.device_check.record import Recorder, read_rows
from lsjax.cli.device_check.report import failed, report

CASE = Case(16, "int8", 2, 256)


def way(change):
    """CPU attention to int8 keys, something about it changed."""

    def changed(q, k, v, seen):
        return attend("cpu", *change(q, k, v, seen), None)

    return Way("changed", changed, lambda case: True, lambda case: False)


def test_attention_as_it_is_passes_and_a_wrong_one_does_not():
    assert check(CASE, way(lambda *inputs: inputs), "cpu")["ok"]
    wrong = (
        lambda q, k, v, seen: (q, k, v, seen._replace(stop=seen.stop - 1)),
        lambda q, k, v, seen: (q, k, v.replace(scale=0 * v.scale + v.scale[0, 0, 0]), seen),
        lambda q, k, v, seen: (1.1 * q, k, v, seen),
    )
    for change in wrong:
        assert not check(CASE, way(change), "cpu")["ok"]


def test_attention_to_other_blocks_than_those_kept_is_found_out():
    def ok(change):
        def attend(q, k, v, keep, stop):
            return attend_to_kept("cpu", q, k, v, *change(keep, stop))

        return check_kept(attend, 16, "int8", 4, "cpu")["ok"]

    assert ok(lambda keep, stop: (keep, stop))
    assert not ok(lambda keep, stop: (keep | True, stop))
    assert not ok(lambda keep, stop: (keep, stop - 1))


def test_a_phase_that_hangs_or_crashes_is_told_and_ends(tmp_path):
    def ended(code, seconds):
        log = str(tmp_path / "log")
        return run_logged([sys.executable, "-c", code], log, seconds, os.environ)

    assert ended("print('fine')", 60) == Ended("done")
    crashed = ended("print('so far'); import os; os.abort()", 60)
    assert crashed.state == "failed" and "so far" in crashed.why
    hung = ended("print('before', flush=True); import time; time.sleep(600)", 1.5)
    assert hung.state == "stopped" and "before" in hung.why


def test_a_failed_check_comes_first_and_rates_are_shares_of_the_ceilings(tmp_path):
    record = Recorder(tmp_path, "ceilings")
    record(what="copy", microseconds=1.0, bytes_per_second=2e12)
    Recorder(tmp_path, "decode")(what="decode attention", heads="A", bytes_per_second=1e12)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"phase": "kernels", "che')  # killed while it wrote
    rows, ended = read_rows(tmp_path), {"decode": Ended("done")}
    assert "50% of copy" in report(rows, ended, 1.0) and not failed(rows, ended)
    assert failed(rows, {"decode": Ended("stopped", "it took more than 9 s")})
    rows.append({"phase": "kernels", "check": "a kernel", "ok": False, "error": 0.5})
    assert report(rows, ended, 1.0).splitlines()[:2] == [
        "1 checks, 1 FAILED",
        "  FAILED  check a kernel, error 0.5",
    ]
    assert failed(rows, ended)
    untimed = [{"phase": "decode", "what": "decode attention", "why": "out of memory"}]
    assert failed(untimed, ended) and "  FAILED  what decode" in report(untimed, ended, 1.0)


def test_phases_and_folders_that_cannot_be_are_refused(tmp_path):
    done = run("check_device.py", "--phases", "kernels,speed")
    assert done.returncode == 2 and "'speed' is not known; use versions, kernels" in done.stderr
    (tmp_path / "file").write_text("")
    done = run("check_device.py", "--output_dir", tmp_path / "file")
    assert done.returncode == 2 and "cannot be used" in done.stderr
