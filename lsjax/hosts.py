"""Several processes, of one host or of many, that run one model together.

All run the same program on the same input; each holds its devices' part of weights and cache, and
the first one does the talking.
"""

import contextlib
import json
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from lsjax.errors import UserError
from lsjax.roll_call import roll_call

# Seconds without a sign of life after which a process is taken for dead, and the others end.
_HEARTBEAT = 20
# Room for a path or a sentence: processes exchange arrays of one size.
_SAID_BYTES = 16384


def connect(
    coordinator_address: str, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Joins the other processes; to be called before anything asks for a device.

    Args:
      coordinator_address: host:port of process 0, or "auto" where Slurm, a TPU pod, GKE or MPI
        says all three: JAX finds them.
      num_processes, process_id: how many there are, and which of them this is.
      timeout: seconds to wait for the others.

    Raises:
      UserError: the numbers do not fit together, or somebody has not come in time.
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
        roll_call(*where, timeout)
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


def is_first() -> bool:
    """Whether this process does the talking, and writes files."""
    # Alone there is no need to ask, which would start the devices.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def only_the_first_talks():
    """What the other processes print, but for errors, goes nowhere."""
    if is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def from_the_first(make: Callable[[], str]) -> str:
    """What the first process makes, in all of them; they wait for one another.

    Raises:
      UserError: making it raised one; all then do.
    """
    if jax.process_count() == 1:
        return make()
    wrong, text = False, ""
    if is_first():
        try:
            text = make()
        except UserError as error:
            wrong, text = True, str(error)
    said = np.frombuffer(json.dumps([wrong, text]).encode().ljust(_SAID_BYTES), np.uint8)
    wrong, text = json.loads(multihost_utils.broadcast_one_to_all(said).tobytes())
    if wrong:
        raise UserError(text)
    return text


def greatest(number: int) -> int:
    """The greatest of the processes' numbers, in all of them; they wait for one another."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def to_host(x: jax.Array) -> np.ndarray:
    """An array in the memory of every process, wherever its parts lie."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
