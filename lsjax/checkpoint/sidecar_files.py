"""Copies the files beside the weights, byte for byte."""

import os
import shutil
from collections.abc import Collection

from lsjax.checkpoint.hf_folder import PICKLES, SUFFIX
from lsjax.checkpoint.orbax_checkpoint import PARAMS
from lsjax.runtime.notes import note

# Code is copied for programs that run it: transformers runs the code that auto_map names.
_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jinja", ".md", ".py")
_PREFIXES = ("LICENSE", "NOTICE")
_FOLDERS = ("additional_chat_templates",)
# Index files describe the weight files and are written anew with them.
_INDEX_SUFFIX = ".index.json"


def sidecar_files(folder: str) -> list[str]:
    """Returns the names of the config, tokenizer, generation, code and license files.

    They include the files in folders of chat templates. config.json comes last.
    """
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


def sidecar_bytes(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(folder, name)) for name in sidecar_files(folder))


def copy_sidecar_files(folder: str, new: str, without: Collection[str] = ()) -> None:
    """Copies the sidecar files, except those named in `without`.

    config.json is copied last, because a folder without it is not read as a model.
    """
    for name in sidecar_files(folder):
        if name not in without:
            os.makedirs(os.path.dirname(os.path.join(new, name)), exist_ok=True)
            shutil.copyfile(os.path.join(folder, name), os.path.join(new, name))


def note_left_out(folder: str) -> None:
    """Notes the files in a folder that are neither sidecar files nor weights."""
    known = {*sidecar_files(folder), *_FOLDERS, PARAMS}
    left = [
        name
        for name in sorted(os.listdir(folder))
        if name not in known
        and not name.startswith(".")
        and not name.endswith((SUFFIX, _INDEX_SUFFIX, *PICKLES))
    ]
    if left:
        note(f"{folder}: not carried along: {', '.join(left)}")
