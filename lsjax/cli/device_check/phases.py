"""Defines the phases of a check and what each needs, and runs a phase in its own process."""

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[3]
_LOG_LINES = 12  # last lines shown of a failed phase's log


def _needs_gpu(platform: str) -> str | None:
    return None if platform == "gpu" else f"there is no GPU (JAX's default device is a {platform})"


def _needs_accelerator(platform: str) -> str | None:
    return None if platform != "cpu" else "there is no accelerator"


def _needs_torch(platform: str) -> str | None:
    if not importlib.util.find_spec("torch"):
        return "PyTorch is not installed: pip install torch"
    if platform != "gpu":
        return None
    # This check opens the GPU, so it runs in its own process.
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    return None if done.returncode == 0 else "PyTorch is installed without CUDA, or finds no GPU"


def _needs_ncu(platform: str) -> str | None:
    if missing := _needs_gpu(platform):
        return missing
    return None if shutil.which("ncu") else "ncu is not on the PATH: install Nsight Compute"


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a check.

    Attributes:
      function: "module:function" within lsjax.cli.device_check; called with sizes and a recorder.
      seconds: time limit, after which the phase is stopped.
      missing: function from the platform to what the phase needs and lacks, or None.
      xla_flags: flags added to XLA_FLAGS.
    """

    function: str
    seconds: int
    missing: Callable[[str], str | None] = lambda platform: None
    xla_flags: str = ""


_GRAPH_LOOPS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
DEFAULT: Mapping[str, Phase] = {
    "versions": Phase("environment:versions", 60),
    "kernels": Phase("kernels:kernels", 180),
    "ceilings": Phase("ceilings:ceilings", 60),
    "decode": Phase("attention:decode", 110),
    "prefill": Phase("attention:prefill", 140),
    "cudnn": Phase("attention:cudnn_ceilings", 60, _needs_gpu),
    "demo": Phase("models:demo", 90),
    "model_7b": Phase("models:model_7b", 240, _needs_accelerator),
    "model_05b": Phase("models:model_05b", 120),
    "torch": Phase("ceilings:torch_ceilings", 90, _needs_torch),  # last: it says least about lsjax
}
MORE: Mapping[str, Phase] = {
    "glm_1m": Phase("models:glm_1m", 300, _needs_accelerator),
    "graph_loops": Phase("attention:prefill", 110, _needs_gpu, _GRAPH_LOOPS),
    "ncu": Phase("profile:ncu", 90, _needs_ncu),
}
ALL: Mapping[str, Phase] = {**DEFAULT, **MORE}


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a phase ended.

    Attributes:
      state: done, failed, stopped (at its time limit) or left out.
      why: what is missing, or the phase's last output lines; empty if it is done.
    """

    state: str
    why: str = ""


def run_phase(name: str, folder: str, platform: str, seconds: float) -> Ended:
    """Runs a phase in its own process and returns how it ended, even if it crashes or hangs.

    Args:
      name: a key of ALL.
      folder: folder for the phase's rows and log.
      platform: cpu, gpu or tpu; empty before the first phase has found it out.
      seconds: time limit; the phase's own limit applies if it is shorter.
    """
    phase = ALL[name]
    command = [sys.executable, "-m", "lsjax.cli.device_check", name, folder, platform]
    log = os.path.join(folder, f"{name}.log")
    return run_logged(command, log, min(seconds, phase.seconds), _environment(phase))


def run_logged(
    command: Sequence[str], log: str, seconds: float, environment: Mapping[str, str]
) -> Ended:
    """Runs a command, and kills its whole process group once its time is up."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # its own process group, killed as a whole
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Ended("stopped", f"it took more than {seconds:.0f} s\n{_last_lines(log)}")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return Ended("done") if status == 0 else Ended("failed", f"status {status}\n{_last_lines(log)}")


def _environment(phase: Phase) -> dict[str, str]:
    """Returns a phase's environment: 95% of GPU memory, its XLA flags, this checkout's lsjax."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), phase.xla_flags)))
    return os.environ | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": flags,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95",
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }


def _last_lines(log: str) -> str:
    with open(log, encoding="utf-8", errors="replace") as file:
        return "".join(file.readlines()[-_LOG_LINES:]).rstrip()
