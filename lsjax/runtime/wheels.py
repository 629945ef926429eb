"""Fetches a file that a package index holds: a wheel, pinned by version and hash."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lsjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel in pip's package index.

    Attributes:
      package: name of the package.
      version: its version.
      file: name of the wheel's file.
      sha256: hash of the file, in hexadecimal.
    """

    package: str
    version: str
    file: str
    sha256: str


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Returns the path of a wheel in a folder, to which pip downloads it if it is not there.

    The file appears when it is complete and its hash is right. A damaged one is downloaded again.
    Nothing in it is run, and nothing is installed.

    Raises:
      UserError: pip cannot download it, its hash is another, or the folder cannot be written.
    """
    path = folder / wheel.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and _sha256(path) == wheel.sha256:
            return path
        with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as incomplete:
            _download(wheel, incomplete)
            fetched = Path(incomplete, wheel.file)
            found = _sha256(fetched)
            if found != wheel.sha256:
                raise UserError(
                    f"the {wheel.file} that pip downloaded has the sha256 {found}, not "
                    f"{wheel.sha256}, and was deleted; see with 'pip config list' which index it "
                    "comes from, and try again."
                )
            os.replace(fetched, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    return path


def _download(wheel: Wheel, folder: str) -> None:
    wanted = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--retries=2", f"--dest={folder}", wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not os.path.exists(os.path.join(folder, wheel.file)):
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise UserError(
            f"pip cannot download {wanted} ({said[-1]}), which takes the network once; try again "
            f"when 'pip download --no-deps {wanted}' works."
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
