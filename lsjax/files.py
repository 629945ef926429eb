"""Writing a file whole or not at all."""

import os
import tempfile

from lsjax.errors import UserError
from lsjax.hosts import is_first


def write_atomically(path: str, text: str) -> None:
    """Writes UTF-8 text; whatever happens, `path` never holds half of it.

    Of several processes that run one model, the first one writes.

    Raises:
      UserError: it cannot be written there.
    """
    if not is_first():
        return
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=folder, prefix=".incomplete-", delete=False
        ) as f:
            temporary = f.name
            f.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def check_writable(path: str) -> None:
    """Refuses a path whose folder is not there, before the work that fills it.

    Raises:
      UserError: saying which folder.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written: {folder} is not a folder to write in.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the path of a file.")
