"""Runs one phase in this process: python -m lsjax.device_check PHASE FOLDER PLATFORM.

The platform is given, so that phases which leave the device to other programs never open it.
"""

import importlib
import sys

from lsjax.compilation import enable_persistent_cache
from lsjax.device_check.phases import ALL
from lsjax.device_check.record import Recorder
from lsjax.device_check.sizes import sizes_on


def main(name: str, folder: str, platform: str) -> None:
    enable_persistent_cache()
    module, _, function = ALL[name].function.partition(":")
    phase = getattr(importlib.import_module(f"lsjax.device_check.{module}"), function)
    phase(sizes_on(platform), Recorder(folder, name))


if __name__ == "__main__":
    main(*sys.argv[1:])
