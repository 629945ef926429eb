"""Checks and times lsjax on this machine's device, in at most ten minutes.

See lsjax/cli/check_device.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # lsjax, if not installed

from lsjax.cli.check_device import program

if __name__ == "__main__":
    program()
