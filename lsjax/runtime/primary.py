"""The primary process: the one of several that prints and writes files."""

import contextlib
import os

import jax


def is_primary() -> bool:
    """Returns whether this process is the one that prints and writes files."""
    # A single process need not ask for its index, which would initialize the devices.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def silence_other_processes():
    """Discards what processes other than the primary one print to stdout."""
    if is_primary():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
