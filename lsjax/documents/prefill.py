"""Prefill of a document, saved while it goes on, and documents from and to the disk."""

import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lsjax.cache import DocumentCache, KVCache
from lsjax.documents.folder import DocumentFolder
from lsjax.inference.engine import Engine
from lsjax.inference.request import chunks
from lsjax.runtime.flops import prefill_cost

# What a killed process loses at most: this many seconds, or this share of the work.
_SECONDS, _SHARE = 30.0, 0.05


def prefill_document(
    engine: Engine,
    params: dict,
    ids: Sequence[int],
    cached: int,
    border: int,
    settled_length: int | None,
    folder: DocumentFolder | None = None,
    on_prefill: Callable[[int], None] | None = None,
) -> DocumentCache:
    """Prefills a document, or the rest of it if the folder holds the beginning.

    Args:
      engine: engine of the model.
      params: model parameters.
      ids: token ids of the document.
      cached: number of leading tokens to keep; at least 1.
      border: see sharing_border; reading goes on from a multiple of it.
      settled_length: see Document.
      folder: where to save what is read; None to save nothing.
      on_prefill: called with the number of tokens that were saved before, and after each chunk
        with the number of tokens read.
    """
    rows, chunk = engine.settings.mesh.shape["data"], engine.settings.prefill_chunk
    spec = engine.settings.cache_spec(rows, cached, 0)
    tables = engine.tables([settled_length or len(ids)])
    cache, start = engine.new_cache(spec), 0
    if folder is not None:
        aligned = math.lcm(border, folder.manifest.slice)
        start = folder.manifest.done // aligned * aligned
        cache = _restored(engine, cache, folder, start)
    if on_prefill and start:
        on_prefill(start)
    lengths = np.full(rows, cached, np.int32)
    saver = folder and _Saver(engine, folder, start, cached)
    last = pending = None
    try:
        for at, size in chunks(cached - start, chunk, spec.zigzag.block_length):
            at += start
            tokens = np.zeros((rows, size), np.int32)
            part = ids[at : min(at + size, cached)]
            tokens[:, : len(part)] = part
            cache, last = engine.prefill(params, tables, cache, tokens, at, lengths, last)
            if saver:
                saver.take(cache, at + len(part))
            # Wait only for the previous chunk, so that the device always has one queued.
            if pending is not None:
                jax.block_until_ready(pending)
                if saver:
                    saver.write(at)
            pending = last
            if on_prefill:
                on_prefill(len(part))
        jax.block_until_ready(last)
    finally:
        if saver:
            saver.finish()
    return engine.document(cache, cached)


def _restored(engine: Engine, cache: KVCache, folder: DocumentFolder, done: int) -> KVCache:
    for start, tokens in folder.slices(done):
        cache = engine.write_tokens(cache, tokens, start)
    return cache


def open_cache(engine: Engine, folder: DocumentFolder, cached: int) -> DocumentCache:
    """Reads the first `cached` tokens of a complete folder onto the mesh."""
    spec = engine.settings.cache_spec(engine.settings.mesh.shape["data"], cached, 0)
    cache = _restored(engine, engine.new_cache(spec), folder, cached)
    return engine.document(cache, cached)


def save_cache(engine: Engine, cache: DocumentCache, folder: DocumentFolder) -> None:
    """Writes a document that has been read to a folder, or the rest that is missing there."""
    saver = _Saver(engine, folder, folder.manifest.done, folder.manifest.cached)
    try:
        for end in range(saver.taken, folder.manifest.cached, folder.manifest.slice):
            saver.take(cache, min(end + folder.manifest.slice, folder.manifest.cached))
            saver.write(folder.manifest.cached)
    finally:
        saver.finish()


class _Saver:
    """Takes slices from the cache as soon as they are complete, and writes them a little later.

    Attributes:
      taken: number of tokens taken so far.
    """

    def __init__(self, engine: Engine, folder: DocumentFolder, start: int, cached: int):
        self._engine, self._folder, self._cached = engine, folder, cached
        self.taken = self._written = start
        self._slices: list = []
        self._cost = lambda tokens: prefill_cost(engine.config, 0, tokens)
        self._next = time.monotonic() + _SECONDS

    def take(self, cache: KVCache | DocumentCache, filled: int) -> None:
        """Takes all slices that end within the first `filled` tokens, or with the document."""
        size = self._folder.manifest.slice
        while self.taken < filled and (self.taken + size <= filled or filled == self._cached):
            self._slices.append((self.taken, self._engine.read_tokens(cache, self.taken, size)))
            self.taken = min(self.taken + size, self._cached)

    def write(self, computed: int) -> None:
        """Writes the slices within the first `computed` tokens, which are there by now."""
        size = self._folder.manifest.slice
        while self._slices and min(self._slices[0][0] + size, self._cached) <= computed:
            start, tokens = self._slices.pop(0)
            self._folder.append(tokens, start)
            self._written = min(start + size, self._cached)
        unsaved = self._cost(self._written) - self._cost(self._folder.manifest.done)
        if unsaved >= _SHARE * self._cost(self._cached) or time.monotonic() > self._next:
            self._commit()

    def finish(self) -> None:
        """Writes all slices that were taken."""
        self.write(self._cached)
        self._commit()

    def _commit(self) -> None:
        self._folder.commit(self._written)
        self._next = time.monotonic() + _SECONDS
