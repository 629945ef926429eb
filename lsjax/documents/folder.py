"""A document on disk: written slice by slice while it is read, in the order of positions.

What is saved does not depend on the mesh or the prefill chunk. Entries and scales are Zarr arrays
of [layers, 2, kv_heads, tokens, ...], keys before values, with a checksum for each slice of tokens.
`document.json` counts the tokens that are durable, and is replaced after they are. Of a compressed
document each layer has arrays of its own; see lsjax.documents.compressed.

A model with recurrent layers goes on only where their states are there. A snapshot of them is an
array of bytes with a checksum, named by the number of tokens before it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from lsjax.attention.kv_array import KVArray
from lsjax.cache import TokenSlice
from lsjax.checkpoint.atomic_directory import is_disk_full
from lsjax.documents.fingerprint import check_fingerprint, hash_of_ids
from lsjax.documents.manifest import FORMAT, Manifest, last_of_parts
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note
from lsjax.runtime.text_files import parse_json, read_text, write_atomically

_NAME, _IDS, _LOCK, _STATES = "document.json", "ids.bin", "lock", "states"
_SLICE_BYTES = 2**26
_LEAST_TOKENS = 256
_PENDING, _AHEAD = 8, 4  # writes in flight, and slices that are read ahead


class DocumentFolder:
    """A folder that holds a document, or as much of it as has been read.

    Attributes:
      path: the folder.
      manifest: what is saved.
    """

    def __init__(self, path: str, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self._stores: KVArray | None = None
        self._pending: list[Any] = []

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "DocumentFolder":
        """Opens an existing folder.

        Raises:
          UserError: the folder holds no document, or one of another format.
        """
        path = os.path.abspath(path)
        name = os.path.join(path, _NAME)
        if not os.path.exists(name):
            raise UserError(f"{path} holds no document ({_NAME} is missing); read one into it.")
        found = parse_json(read_text(name), name)
        try:
            manifest = Manifest(**found)
        except TypeError:
            manifest = None
        manifest = manifest and dataclasses.replace(manifest, states=tuple(manifest.states))
        if manifest is None or manifest.format != FORMAT:
            raise UserError(
                f"{name} is not one of this version's (format {FORMAT}); remove {path} and read "
                "the document again."
            )
        return cls(path, manifest)

    @classmethod
    def create(cls, path: str | os.PathLike[str], ids: Sequence[int], **facts: Any):
        """Creates a folder for a document, or opens the one that was begun for the same document.

        Args:
          path: folder; it may exist.
          ids: token ids of the document.
          **facts: fingerprint, cached, slice and settled_length; see Manifest.

        Raises:
          UserError: the folder holds something else; the message says what differs.
        """
        path, wanted = os.path.abspath(path), hash_of_ids(ids)
        if os.path.exists(os.path.join(path, _NAME)):
            folder = cls.open(path)
            held = folder.manifest
            check_fingerprint(path, held.fingerprint, facts["fingerprint"])
            if held.ids != wanted:
                raise UserError(f"{path} holds another text; name another folder, or remove it.")
            if held.settled_length != facts["settled_length"]:
                raise UserError(
                    f"{path} was read for {held.settled_length} tokens with question and answer, "
                    f"not for {facts['settled_length']}; give the same reserve, or another folder."
                )
            return folder
        if os.path.isdir(path) and set(os.listdir(path)) - {_LOCK, _IDS}:
            raise UserError(f"{path} is not empty and holds no document; name a new folder.")
        try:
            os.makedirs(path, exist_ok=True)
            with open(os.path.join(path, _IDS), "wb") as file:
                file.write(np.asarray(ids, "<i4").tobytes())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        folder = cls(path, Manifest(ids=wanted, tokens=len(ids), done=0, **facts))
        folder._save_manifest()
        return folder

    @property
    def complete(self) -> bool:
        return self.manifest.done >= self.manifest.cached

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other processes from writing to the folder, also if this one is killed.

        Raises:
          UserError: another process is writing to it, or the disk is full.
        """
        with open(os.path.join(self.path, _LOCK), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise UserError(
                    f"{self.path} is being written by another process; wait for it, or name "
                    "another folder."
                ) from None
            try:
                yield
            except Exception as error:
                if not is_disk_full(error):
                    raise
                self._pending.clear()
                raise UserError(
                    f"the disk of {self.path} is full; {self.manifest.done} of "
                    f"{self.manifest.cached} tokens are saved. Make room and read the document "
                    "again: reading goes on from there."
                ) from error

    def token_ids(self) -> tuple[int, ...]:
        """Returns the ids of the document.

        Raises:
          UserError: they are damaged.
        """
        try:
            ids = np.fromfile(os.path.join(self.path, _IDS), "<i4")
        except OSError as error:
            raise self._damaged(error) from None
        if len(ids) != self.manifest.tokens or hash_of_ids(ids) != self.manifest.ids:
            raise self._damaged(f"{_IDS} is not what was written")
        return tuple(ids.tolist())

    def append(self, tokens: TokenSlice, start: int) -> None:
        """Begins to write the tokens from `start` on; `commit` makes them durable."""
        tokens = KVArray(*(None if x is None else _as_bits(x) for x in (tokens.data, tokens.scale)))
        if self._stores is None:
            self._stores = self._create_stores(tokens)
        for store, x in zip(_arrays(self._stores), _arrays(tokens), strict=True):
            stop = min(start + x.shape[3], self.manifest.cached)
            part = np.ascontiguousarray(x[:, :, :, : stop - start])
            self._pending.append(store[:, :, :, start:stop].write(part))
        while len(self._pending) > _PENDING:  # they hold host memory
            self._pending.pop(0).result()

    def commit(self, done: int, snapshot: tuple[int, np.ndarray] | None = None) -> None:
        """Waits until all appended tokens are durable, then records that the first `done` are.

        `snapshot` is one of the states after some of these tokens, and their number.
        """
        states = self.manifest.states
        if snapshot and snapshot[0] not in states:
            at, content = snapshot
            self.write_array(f"{_STATES}/{at}", content)
            states = last_of_parts((*states, at), self.manifest.cached)
        for write in self._pending:
            write.result()
        self._pending.clear()
        done = max(done, self.manifest.done)
        if (done, states) != (self.manifest.done, self.manifest.states):
            self.manifest = dataclasses.replace(self.manifest, done=done, states=states)
            self._save_manifest()
            self._delete_snapshots()

    def _delete_snapshots(self) -> None:
        """Deletes the snapshots that document.json does not name."""
        path = os.path.join(self.path, _STATES)
        for name in os.listdir(path) if os.path.isdir(path) else ():
            if name not in map(str, self.manifest.states):
                shutil.rmtree(os.path.join(path, name))

    def read_snapshot(self, at: int, nbytes: int) -> np.ndarray:
        """Returns the snapshot after `at` tokens.

        Raises:
          UserError: it is missing, damaged or of another size.
        """
        return self.read_array(f"{_STATES}/{at}", (nbytes,))

    def write_array(self, name: str, x: np.ndarray) -> None:
        """Begins to write an array of a compressed document, in slices of tokens, its third axis.

        One with fewer axes is written as a whole. `finish` or `commit` makes it durable.
        """
        x = np.ascontiguousarray(_as_bits(x))
        chunk = list(x.shape)
        chunk[2:3] = (min(n, self.manifest.slice) for n in chunk[2:3])
        self._pending.append(self._create(name, x.dtype, x.shape, chunk).write(x))
        while len(self._pending) > _PENDING:
            self._pending.pop(0).result()

    def read_array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns an array that `write_array` has written, bfloat16 as its bits.

        Raises:
          UserError: it is missing, damaged or of another shape.
        """
        x = self._read(name)
        if x.shape != shape:
            raise self._damaged(f"{name} has the shape {x.shape}, not {shape}")
        return x

    def _read(self, name: str) -> np.ndarray:
        try:
            return ts.open(self._spec(name)).result().read().result()
        except (ValueError, OSError) as error:
            raise self._damaged(error) from None

    def finish(self, cached: int, snapshot: tuple[int, np.ndarray] | None = None) -> None:
        """Waits until all arrays are durable, then records that `cached` tokens are saved.

        See `commit` for the snapshot.
        """
        self.manifest = dataclasses.replace(self.manifest, cached=cached)
        self.commit(cached, snapshot)

    def end(self, cached: int) -> None:
        """Records that no more than `cached` tokens are saved: a mesh may share fewer of them."""
        if cached < self.manifest.cached and self.manifest.done <= cached:
            self.manifest = dataclasses.replace(self.manifest, cached=cached)
            self._save_manifest()

    def copy_from(self, other: "DocumentFolder", tokens: int) -> None:
        """Copies the first tokens of another document, in whole slices, to this empty one.

        So are the snapshots of states after them. A damaged one ends the copy, with a note.
        """
        size = self.manifest.slice
        done = 0
        try:
            for start, part in other.slices(min(tokens, self.manifest.cached) // size * size, size):
                self.append(part, start)
                done = start + size
            for at in other.manifest.states:
                if at <= done:
                    self.commit(done, (at, other._read(f"{_STATES}/{at}")))
        except UserError as error:
            other.note_damage(error)
        self.commit(done)

    def note_damage(self, error: UserError) -> None:
        """Notes that this folder, one of many, is passed over."""
        root, name = os.path.split(self.path)
        note(
            f"a saved document is passed over: {error} `lsjax-documents --document_cache {root} "
            f"--delete {name}` removes it."
        )

    def slices(self, done: int, size: int | None = None) -> Iterator[tuple[int, TokenSlice]]:
        """Yields the start and the tokens of each slice of the first `done` tokens, in order.

        `size` is the number of tokens to yield at a time; None for those that are stored together.

        Raises:
          UserError: a slice is missing or damaged.
        """
        if not done:
            return
        try:
            stores = self._open_stores()
            size = size or self.manifest.slice
            starts = range(0, done, size)
            reads: list[Any] = []
            for at in [*starts, *[None] * _AHEAD]:
                if at is not None:
                    stop = min(at + size, done)
                    reads.append((at, [x[:, :, :, at:stop].read() for x in _arrays(stores)]))
                if reads and (len(reads) > _AHEAD or at is None):
                    start, futures = reads.pop(0)
                    data, *scale = (future.result() for future in futures)
                    yield start, KVArray(data, scale[0] if scale else None)
        except (ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(error) from None

    def _create_stores(self, tokens: TokenSlice) -> KVArray:
        if self.manifest.done:
            return self._open_stores()

        def create(name: str, x: np.ndarray | None) -> ts.TensorStore | None:
            if x is None:
                return None
            shape = [*x.shape[:3], self.manifest.cached, *x.shape[4:]]
            chunk = [*x.shape[:3], self.manifest.slice, *x.shape[4:]]
            return self._create(name, x.dtype, shape, chunk)

        return KVArray(create("entries", tokens.data), create("scales", tokens.scale))

    def _create(
        self, name: str, dtype: np.dtype, shape: Sequence[int], chunk: Sequence[int]
    ) -> ts.TensorStore:
        metadata = {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
        }
        spec = self._spec(name) | {"metadata": metadata, "create": True}
        return ts.open(spec | {"delete_existing": True}).result()

    def _open_stores(self) -> KVArray:
        def open_(name: str) -> ts.TensorStore:
            return ts.open(self._spec(name)).result()

        scales = os.path.exists(os.path.join(self.path, "scales"))
        return KVArray(open_("entries"), open_("scales") if scales else None)

    def _spec(self, name: str) -> dict[str, Any]:
        kvstore = {"driver": "file", "path": os.path.join(self.path, name)}
        # What is not there is missing, so zeros are written as well.
        zeros = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
        return {"driver": "zarr3", "kvstore": kvstore, **zeros}

    def _save_manifest(self) -> None:
        content = json.dumps(dataclasses.asdict(self.manifest), indent=1)
        write_atomically(os.path.join(self.path, _NAME), content + "\n")

    def _damaged(self, reason: object) -> UserError:
        reason = str(reason).strip().partition("\n")[0].partition(" [tensorstore_spec")[0]
        return UserError(
            f"{self.path} is damaged; remove it and read the document again ({reason})."
        )


def slice_tokens(token_bytes: int, chunk: int) -> int:
    """Returns the tokens per slice: about a prefill chunk, and about 64 MiB at most.

    It is a power of two. A rolling cache holds a chunk longer than that is needed.
    """
    most = min(chunk, max(_LEAST_TOKENS, _SLICE_BYTES // token_bytes))
    return 1 << most.bit_length() - 1


def _arrays(x: KVArray) -> list[Any]:
    return [part for part in (x.data, x.scale) if part is not None]


def _as_bits(x: Any) -> np.ndarray:
    """Returns an array on the host, bfloat16 as its bits."""
    x = np.asarray(x)
    return x.view(np.uint16) if x.dtype.name == "bfloat16" else x
