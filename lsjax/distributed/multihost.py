"""Several processes, on one host or many, that run one model together.

All processes run the same program on the same input. Each holds its devices' shards of weights and
cache. The first process is the primary one: it prints and writes files.
"""

import json
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from lsjax.distributed.rendezvous import rendezvous
from lsjax.runtime.errors import UserError
from lsjax.runtime.primary import is_primary

# Seconds without a heartbeat after which a process counts as dead, and the others exit.
_HEARTBEAT = 20
# Bytes of a broadcast message, enough for a path or a sentence: all messages need the same size.
_SAID_BYTES = 16384


def connect(
    coordinator_address: str, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Connects to the other processes. Call it before anything initializes JAX's devices.

    Args:
      coordinator_address: host:port of process 0; or "auto" on Slurm, a TPU pod, GKE or MPI, where
        JAX finds the address, the number of processes and the process id itself.
      num_processes: number of processes; None with "auto".
      process_id: index of this process; None with "auto".
      timeout: seconds to wait for the other processes.

    Raises:
      UserError: the arguments are inconsistent, or a process did not join in time.
    """
    if coordinator_address == "auto":
        if num_processes is not None or process_id is not None:
            raise UserError(
                "coordinator_address auto finds num_processes and process_id as well; leave them "
                "out, or give all three."
            )
        where = (None, None, None)
    else:
        where = _checked(coordinator_address, num_processes, process_id)
        rendezvous(*where, timeout)
    jax.distributed.initialize(
        *where, initialization_timeout=timeout, heartbeat_timeout_seconds=_HEARTBEAT
    )


def _checked(address: str, count: int | None, number: int | None) -> tuple[str, int, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(
            f"coordinator_address must be host:port of process 0 (or auto), not {address!r}."
        )
    if count is None or number is None:
        raise UserError(
            "coordinator_address goes with num_processes and process_id; give all three, or "
            "coordinator_address auto."
        )
    if not 0 <= number < count:
        raise UserError(f"process_id must be from 0 to num_processes - 1 = {count - 1}: {number}.")
    return address, count, number


def broadcast_from_primary(make: Callable[[], str]) -> str:
    """Calls `make` in the primary process, and returns its text in all processes.

    All processes wait for each other.

    Raises:
      UserError: `make` raised one; then all processes raise it.
    """
    if jax.process_count() == 1:
        return make()
    wrong, text = False, ""
    if is_primary():
        try:
            text = make()
        except UserError as error:
            wrong, text = True, str(error)
    said = np.frombuffer(json.dumps([wrong, text]).encode().ljust(_SAID_BYTES), np.uint8)
    wrong, text = json.loads(multihost_utils.broadcast_one_to_all(said).tobytes())
    if wrong:
        raise UserError(text)
    return text


def all_processes_max(number: int) -> int:
    """Returns the largest of all processes' numbers in each process; they wait for each other."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def to_host(x: jax.Array) -> np.ndarray:
    """Copies an array to the host memory of every process, wherever its shards are."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
