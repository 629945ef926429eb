"""A folder of saved documents, which is kept below a size: those used least recently go first."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable

import numpy as np

from lsjax.documents.document import Document
from lsjax.documents.fingerprint import hash_of_ids
from lsjax.documents.folder import DocumentFolder
from lsjax.documents.manifest import Manifest
from lsjax.documents.read import read_document
from lsjax.inference.engine import Engine
from lsjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class SavedDocument:
    """A document in the folder.

    Attributes:
      folder: its own folder.
      used: time of its last use, in seconds since 1970.
    """

    folder: DocumentFolder
    used: float

    @property
    def name(self) -> str:
        """Name of its own folder."""
        return os.path.basename(self.folder.path)

    @property
    def manifest(self) -> Manifest:
        """What is saved."""
        return self.folder.manifest

    @functools.cached_property
    def nbytes(self) -> int:
        """Size on disk."""
        return sum(
            os.path.getsize(os.path.join(path, name))
            for path, _, names in os.walk(self.folder.path)
            for name in names
        )


def read_kept(
    engine: Engine,
    params: dict,
    document: Document,
    root: str | os.PathLike[str],
    most_bytes: float,
    on_prefill: Callable[[int], None] | None = None,
) -> Document:
    """Reads a document into a folder of many, from where it differs from those that are there.

    Args:
      engine: engine of the model.
      params: model parameters.
      document: document that `unread_document` has returned.
      root: folder of saved documents.
      most_bytes: size that `root` is kept below.
      on_prefill: see prefill_document.
    """
    path, begins_as = document_path(root, document), longest_prefix(root, document)
    found = read_document(engine, params, document, path, begins_as, on_prefill)
    mark_used(path)
    prune(root, most_bytes, keep=path)
    return found


def document_path(root: str | os.PathLike[str], document: Document) -> str:
    """Returns the folder of a document, which follows from its ids and its fingerprint."""
    facts = [document.fingerprint, document.settled_length, hash_of_ids(document.token_ids)]
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return os.path.join(os.path.abspath(root), name)


def longest_prefix(
    root: str | os.PathLike[str], document: Document
) -> tuple[DocumentFolder | None, int]:
    """Returns the saved document that begins as this one for longest, and for how many tokens.

    Only those of the same model, settings and settled length count, and only what is saved. One
    that is damaged is passed over, with a note. What is compressed is no beginning of another. With
    recurrent layers the one that has the last snapshot of states within the beginning is returned.
    """
    best: tuple[DocumentFolder | None, int] = None, 0
    longest = 0  # that reading can go on after
    if document.engine.by_layer:
        return best
    wanted = np.asarray(document.token_ids)
    for saved in saved_documents(root) if os.path.isdir(root) else ():
        held = saved.manifest
        same = (held.fingerprint, held.settled_length)
        if same != (document.fingerprint, document.settled_length) or held.done <= longest:
            continue
        try:
            ids = np.asarray(saved.folder.token_ids()[: min(len(wanted), held.done)])
        except UserError as error:
            saved.folder.note_damage(error)
            continue
        differ = np.flatnonzero(ids != wanted[: len(ids)])
        common = int(differ[0]) if len(differ) else len(ids)
        start = held.last_state(common) if document.engine.config.recurrences else common
        if start > longest:
            best, longest = (saved.folder, common), start
    return best


def mark_used(path: str) -> None:
    """Records that a saved document is used now."""
    with contextlib.suppress(OSError):  # a folder that may only be read
        os.utime(path, (time.time(), time.time()))


def saved_documents(root: str | os.PathLike[str]) -> list[SavedDocument]:
    """Returns the documents in a folder, the one used least recently first.

    What is no document of this version is left out.

    Raises:
      UserError: there is no such folder.
    """
    if not os.path.isdir(root):
        raise UserError(f"{os.fspath(root)} is not a folder; name one that holds documents.")
    found = []
    for entry in os.scandir(root):
        with contextlib.suppress(UserError):
            found.append(SavedDocument(DocumentFolder.open(entry.path), entry.stat().st_mtime))
    return sorted(found, key=lambda saved: saved.used)


def delete(root: str | os.PathLike[str], name: str) -> None:
    """Deletes a saved document.

    Raises:
      UserError: there is none of this name, or another process is writing to it.
    """
    path = os.path.join(root, name)
    if os.path.basename(name) != name:
        raise UserError(f"{name!r} is not the name of a document; names have no separators.")
    with DocumentFolder.open(path).writing():
        shutil.rmtree(path)


def prune(root: str | os.PathLike[str], most_bytes: float, keep: str) -> list[str]:
    """Deletes documents until the rest takes at most `most_bytes`; returns the deleted names.

    The document at the path `keep` stays, and so do those that are being written.
    """
    documents, deleted = saved_documents(root), []
    total = sum(saved.nbytes for saved in documents)
    for saved in documents:
        if total <= most_bytes:
            break
        if saved.name == os.path.basename(keep):
            continue
        with contextlib.suppress(UserError):
            delete(root, saved.name)
            deleted.append(saved.name)
            total -= saved.nbytes
    return deleted
