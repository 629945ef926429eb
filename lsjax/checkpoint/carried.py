"""The files beside the weights, which a conversion carries along byte for byte."""

import os
import shutil
from collections.abc import Collection

from lsjax.checkpoint.hf_folder import PICKLES, SUFFIX
from lsjax.checkpoint.orbax_checkpoint import PARAMS
from lsjax.notes import note

# Code is carried for those who run it: transformers does, where auto_map names it.
_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jinja", ".md", ".py")
_PREFIXES = ("LICENSE", "NOTICE")
_FOLDERS = ("additional_chat_templates",)
# These describe the files of weights, and are written anew with them.
_INDEX_SUFFIX = ".index.json"


def carried_files(folder: str) -> list[str]:
    """Names of the config, tokenizer, generation, code and licence files, and of those in folders
    of chat templates; config.json is the last."""
    names = [
        name
        for name in _files(folder)
        if (name.endswith(_SUFFIXES) or name.startswith(_PREFIXES))
        and not name.endswith(_INDEX_SUFFIX)
    ]
    for inner in _FOLDERS:
        path = os.path.join(folder, inner)
        if os.path.isdir(path):
            names += [os.path.join(inner, name) for name in _files(path)]
    return sorted(names, key="config.json".__eq__)


def _files(folder: str) -> list[str]:
    return [n for n in sorted(os.listdir(folder)) if os.path.isfile(os.path.join(folder, n))]


def carried_bytes(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(folder, name)) for name in carried_files(folder))


def carry(folder: str, new: str, but: Collection[str] = ()) -> None:
    """Copies those files, `but` some. A folder without config.json is not read: it comes last."""
    for name in carried_files(folder):
        if name not in but:
            os.makedirs(os.path.dirname(os.path.join(new, name)), exist_ok=True)
            shutil.copyfile(os.path.join(folder, name), os.path.join(new, name))


def note_left_out(folder: str) -> None:
    """Names what lies in a folder and is neither carried nor weights."""
    known = {*carried_files(folder), *_FOLDERS, PARAMS}
    left = [
        name
        for name in sorted(os.listdir(folder))
        if name not in known
        and not name.startswith(".")
        and not name.endswith((SUFFIX, _INDEX_SUFFIX, *PICKLES))
    ]
    if left:
        note(f"{folder}: not carried along: {', '.join(left)}")
