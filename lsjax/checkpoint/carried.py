"""The files beside the weights, which a conversion carries along byte for byte."""

import os
import shutil
from collections.abc import Collection

_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jinja", ".md")
_PREFIXES = ("LICENSE", "NOTICE")
# These describe the files of weights, and are written anew with them.
_INDEX_SUFFIX = ".index.json"


def carried_files(folder: str) -> list[str]:
    """Names of the config, tokenizer, generation and licence files; config.json is the last."""
    names = [
        name
        for name in sorted(os.listdir(folder))
        if os.path.isfile(os.path.join(folder, name))
        and (name.endswith(_SUFFIXES) or name.startswith(_PREFIXES))
        and not name.endswith(_INDEX_SUFFIX)
    ]
    return sorted(names, key="config.json".__eq__)


def carried_bytes(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(folder, name)) for name in carried_files(folder))


def carry(folder: str, new: str, but: Collection[str] = ()) -> None:
    """Copies those files, `but` some. A folder without config.json is not read: it comes last."""
    for name in carried_files(folder):
        if name not in but:
            shutil.copyfile(os.path.join(folder, name), os.path.join(new, name))
