"""One of two processes: loads a folder, saves it, loads what was saved; counts what it reads.

python load_and_save.py <coordinator> <process id> <folder> <the same converted> <new folder>
"""

import collections
import json
import sys
from pathlib import Path

from lsjax.distributed.multihost import connect


def bytes_read() -> int:
    """By this process, of files and pipes."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def main(address: str, process_id: str, folder: str, converted: str, out: str) -> None:
    connect(address, 2, int(process_id), 60)
    from lsjax.checkpoint import load_parameters, save_parameters
    from lsjax.distributed.sharding import make_mesh, parse_mesh
    from lsjax.families import read_config

    config = read_config(folder)

    def load(folder: str, mesh: str) -> dict:
        before = bytes_read()
        params = load_parameters(folder, config, make_mesh(parse_mesh(mesh)), config.dtype)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        shares[folder].append((bytes_read() - before) / size)
        return params

    shares = collections.defaultdict(list)
    load(converted, "context=8")
    shares.clear()  # it has also read the modules and programs that loading takes
    load(converted, "context=8")
    load(folder, "context=2,model=4")
    save_parameters(load(folder, "context=8"), folder, out)
    load(out, "context=8")
    load(out, "context=2,model=4")
    print(json.dumps([shares[folder], shares[converted] + shares[out]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
