"""Creates a folder that appears complete or not at all."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator

from lsjax.runtime.errors import UserError


@contextlib.contextmanager
def atomic_directory(path: str, nbytes: int) -> Iterator[str]:
    """Yields a temporary folder beside `path` and renames it to `path` when the body succeeds.

    If the body fails, the temporary folder is removed. If the process is killed, it stays, under
    a name that contains `.incomplete-`.

    Args:
      path: folder to create; it must be absent or empty.
      nbytes: number of bytes that will be written; the disk must have that much free space.

    Raises:
      UserError: `path` is taken or cannot be written, or the disk has too little space or fills up.
    """
    path = os.path.realpath(path)
    check_free(path)
    parent = os.path.dirname(path)
    temporary = f"{path}.incomplete-{uuid.uuid4().hex[:8]}"
    try:
        os.makedirs(parent, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise UserError(
                f"{path} will take {_gb(nbytes)}, but its disk has {_gb(free)} free; make room or "
                "name a folder on another disk."
            )
        os.mkdir(temporary)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}.") from None
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise UserError(
                f"the disk of {path} ran full while {_gb(nbytes)} were written; make room or "
                "name a folder on another disk. Nothing was left behind."
            ) from error
        raise


def check_free(path: str) -> None:
    """Refuses a path that is taken, before the work that fills the folder.

    Raises:
      UserError: `path` exists and is not an empty folder.
    """
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f"{path} already exists and is not empty; name a new folder or remove it.")


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error is a write that failed because the disk or quota was full."""
    # TensorStore, which writes for Orbax, gives the reason only in its message.
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(e) in str(error) for e in full)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
