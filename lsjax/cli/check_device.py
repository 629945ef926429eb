"""Checks and times lsjax on this machine's device, in at most ten minutes.

    python scripts/check_device.py --output_dir check
    python scripts/check_device.py --output_dir more --phases ceilings,glm_1m,graph_loops,ncu

Each phase runs in its own process with its own time limit, so one that crashes or hangs stops no
other. Rows are written to results.jsonl in the output folder as they are measured; a table is
printed at the end. On a CPU the sizes are small and the kernels are interpreted, which tests the
program itself.
"""

import os
import signal
import sys
import time

from absl import flags

from lsjax.cli.device_check.phases import ALL, DEFAULT, MORE, Ended, run_phase
from lsjax.cli.device_check.record import RESULTS, read_rows
from lsjax.cli.device_check.report import failed, report
from lsjax.cli.program import run_program
from lsjax.runtime.errors import UserError

FLAGS = flags.FLAGS

_LEAST_SECONDS = 10  # a phase with less time left is not started


def define_flags() -> None:
    flags.DEFINE_string(
        "output_dir", "device_check", "Folder for results.jsonl and the logs of the phases."
    )
    flags.DEFINE_integer(
        "budget_seconds", 560, "Time limit for all phases together, in seconds.", lower_bound=1
    )
    flags.DEFINE_list(
        "phases",
        list(DEFAULT),
        "Phases to run, in this order; versions always runs first. Not run by default: "
        f"{', '.join(MORE)}.",
    )


def main(_: list[str]) -> int:
    if unknown := [name for name in FLAGS.phases if name not in ALL]:
        raise UserError(f"--phases: {unknown[0]!r} is not known; use {', '.join(ALL)}.")
    folder = _new_results(FLAGS.output_dir)
    # A phase is its own process group; exiting by an exception lets run_logged kill it as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start, ended, platform = time.monotonic(), {}, ""
    for name in dict.fromkeys(["versions", *FLAGS.phases]):
        left = FLAGS.budget_seconds - (time.monotonic() - start)
        print(f"{name} ...", end=" ", flush=True)
        ended[name] = _run(name, folder, platform, left)
        print(ended[name].state, flush=True)
        if name == "versions":
            platform = next((r["platform"] for r in read_rows(folder) if "platform" in r), "")
            if not platform:
                print(ended[name].why)
                raise UserError("JAX finds no device; the lines above say why.")
    rows = read_rows(folder)
    print(f"\n{report(rows, ended, time.monotonic() - start)}")
    return int(failed(rows, ended))


def _run(name: str, folder: str, platform: str, left: float) -> Ended:
    if missing := ALL[name].missing(platform):
        return Ended("left out", missing)
    if left < _LEAST_SECONDS:
        return Ended("left out", "no time is left; raise --budget_seconds, or name fewer --phases")
    return run_phase(name, folder, platform, left)


def _new_results(folder: str) -> str:
    """Makes the output folder, empties its results.jsonl and returns the folder's absolute path."""
    try:
        os.makedirs(folder, exist_ok=True)
        open(os.path.join(folder, RESULTS), "w").close()
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be used: {error.strerror}.") from None
    return os.path.abspath(folder)


def program() -> None:
    run_program(main, define_flags)
