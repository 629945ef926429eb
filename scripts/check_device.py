"""Checks and times lsjax on the device that is here, in ten minutes at most.

    python scripts/check_device.py --output_dir check
    python scripts/check_device.py --output_dir more --phases ceilings,glm_1m,graph_loops,ncu

Each phase is a process with a time limit of its own: what aborts or hangs takes nothing else down.
Rows are written to results.jsonl in the folder as they come; a table is printed at the end. On a
CPU everything is small and the kernels are interpreted, to try the program itself.
"""

import os
import pathlib
import signal
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # lsjax, if not installed

from absl import flags

from lsjax import cli
from lsjax.device_check.phases import ALL, DEFAULT, MORE, Ended, run_phase
from lsjax.device_check.record import RESULTS, read_rows
from lsjax.device_check.report import failed, report
from lsjax.errors import UserError

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "output_dir", "device_check", "Folder for results.jsonl and the logs of the phases."
)
flags.DEFINE_integer("budget_seconds", 560, "Seconds that all phases have together.", lower_bound=1)
flags.DEFINE_list(
    "phases",
    list(DEFAULT),
    f"Phases to run, in this order; there are also {', '.join(MORE)}. versions always runs first.",
)

_LEAST_SECONDS = 10  # that a phase must have left to be worth starting


def main(_: list[str]) -> int:
    if unknown := [name for name in FLAGS.phases if name not in ALL]:
        raise UserError(f"--phases: {unknown[0]!r} is not known; use {', '.join(ALL)}.")
    folder = _new_results(FLAGS.output_dir)
    # Phases are groups of their own: whoever ends this process means them too.
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
    """Makes the folder, without the results of an earlier run."""
    try:
        os.makedirs(folder, exist_ok=True)
        open(os.path.join(folder, RESULTS), "w").close()
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be used: {error.strerror}.") from None
    return os.path.abspath(folder)


if __name__ == "__main__":
    sys.exit(cli.run(main))
