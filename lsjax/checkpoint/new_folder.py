"""A folder that appears whole or not at all."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator

from lsjax.errors import UserError


@contextlib.contextmanager
def new_folder(path: str, nbytes: int) -> Iterator[str]:
    """Gives a temporary folder beside `path`, which takes that name once the body is through.

    If the body fails, the temporary folder is removed; if the process is killed, it stays, under
    a name with `.incomplete-` in it.

    Args:
      path: the folder to make; it must not exist, or be empty.
      nbytes: what will be written.

    Raises:
      UserError: `path` is taken or cannot be written, or the disk is or runs full.
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
    """Refuses a name that something has, before the work that fills the folder.

    Raises:
      UserError: it is there, and is not an empty folder.
    """
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f"{path} already exists and is not empty; name a new folder or remove it.")


def is_disk_full(error: BaseException) -> bool:
    """Whether what failed is a write, for want of room."""
    # TensorStore, which writes for Orbax, gives the reason in its text alone.
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(e) in str(error) for e in full)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
