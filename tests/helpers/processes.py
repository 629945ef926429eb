"""Programs as processes of their own, where that is what is tested."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from helpers.programs import Finished


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(program: Path, *arguments: object, devices: int = 8, **environment: str):
    """Starts a program, which has so many CPU devices and compiles as the tests do.

    Args:
      program: its file.
      arguments: its words.
      devices: number of CPU devices.
      environment: variables beside those of this process.
    """
    count = f"device_count={devices}"
    own = {"JAX_PLATFORMS": "cpu"}
    own["XLA_FLAGS"] = re.sub(r"device_count=\d+", count, os.environ["XLA_FLAGS"])
    return subprocess.Popen(
        [sys.executable, program, *map(str, arguments)],
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> Finished:
    """Waits for a process to end, and kills it where it does not."""
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Finished(process.returncode, out, errors)
