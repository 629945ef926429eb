"""Runs one phase in this process: python -m lsjax.cli.device_check PHASE FOLDER PLATFORM.

PLATFORM is an argument, so that phases which leave the device to other programs never open it.
"""

import importlib
import sys

from lsjax.cli.device_check.phases import ALL
from lsjax.cli.device_check.record import Recorder
from lsjax.cli.device_check.sizes import sizes_on
from lsjax.runtime.compilation import enable_persistent_cache


def main(name: str, folder: str, platform: str) -> None:
    enable_persistent_cache()
    module, _, function = ALL[name].function.partition(":")
    phase = getattr(importlib.import_module(f"lsjax.cli.device_check.{module}"), function)
    phase(sizes_on(platform), Recorder(folder, name))


if __name__ == "__main__":
    main(*sys.argv[1:])
