"""Prefill of a document, saved while it goes on, and documents from and to the disk."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np

from lsjax.cache import CacheSpec, DocumentCache, KVCache, shared_layers, without_tails
from lsjax.documents.folder import DocumentFolder
from lsjax.inference.engine import Engine
from lsjax.inference.request import chunks

if TYPE_CHECKING:
    from lsjax.documents.document import Document

# Shortest time between two records of what is saved, in seconds. A killed process loses as much,
# and the chunks that are not whole slices yet.
_INTERVAL = 1.0


def prefill_document(
    engine: Engine,
    params: dict,
    document: "Document",
    folder: DocumentFolder | None = None,
    on_prefill: Callable[[int], None] | None = None,
) -> DocumentCache:
    """Prefills a document, or what the folder does not hold of it.

    Args:
      engine: engine of the model.
      params: model parameters.
      document: document without its cache.
      folder: where to save what is read; None to save nothing.
      on_prefill: called with the number of tokens that were saved before, and after each chunk
        with the number of tokens read.
    """
    tables = engine.tables([document.settled_length or len(document)])
    prefill = functools.partial(
        _prefill, engine, params, tables, document.token_ids, on_prefill or (lambda tokens: None)
    )
    cached, shared = document.cached, document.shared
    start, saver = 0, None
    if folder is not None:
        chunk = engine.settings.prefill_chunk
        aligned = math.lcm(document.border, folder.manifest.slice, chunk)
        done = folder.manifest.done
        start = cached if done >= cached else done // aligned * aligned
        saver = _Saver(engine, folder, start, min(cached, folder.manifest.cached))
    spec = _spec(engine, cached)
    if start:
        cache = engine.cache_of(spec, folder.slices(start))
        if on_prefill:
            on_prefill(start)
    else:
        cache = engine.new_cache(spec)
    try:
        cache = prefill(cache, start, cached, saver=saver)
    finally:
        if saver:
            saver.finish()
    windows = engine.config.windows
    spec = dataclasses.replace(_spec(engine, shared - cached), chunk=0)  # which begins anywhere
    rest = tuple(
        own if window is None else layer
        for own, layer, window in zip(engine.cache_of(spec, ()), cache, windows, strict=True)
    )
    read = DocumentCache(shared_layers(cache, windows), np.int32(cached), ())
    return read.replace(rest=prefill(rest, cached, shared, document=read))


def _spec(engine: Engine, tokens: int) -> CacheSpec:
    rows = engine.settings.mesh.shape["data"]  # one on each device, all alike
    spec = engine.settings.cache_spec(rows, max(tokens, 1), 0)
    if spec.sparse:  # a document's last tokens are not those of a prompt
        spec = dataclasses.replace(spec, sparse=dataclasses.replace(spec.sparse, last_tokens=0))
    return spec


def _prefill(
    engine, params, tables, ids, on_prefill, cache, start, stop, *, saver=None, document=None
):
    """Prefills the tokens start .. stop - 1 chunk by chunk; returns the cache."""
    rows, settings = engine.settings.mesh.shape["data"], engine.settings
    lengths = np.full(rows, stop, np.int32)
    last = pending = None
    for at, size in chunks(stop - start, settings.prefill_chunk, settings.zigzag.block_length):
        at += start
        part = ids[at : min(at + size, stop)]
        tokens = np.zeros((rows, size), np.int32)
        tokens[:, : len(part)] = part
        cache, last = engine.prefill(params, tables, cache, tokens, at, lengths, last, document)
        if saver:
            saver.take(cache, at + len(part))
        # Wait only for the previous chunk, so that the device always has one queued.
        if pending is not None:
            jax.block_until_ready(pending[1])
            if saver:
                saver.write(at)
            on_prefill(pending[0])
        pending = len(part), last
    if pending is not None:
        jax.block_until_ready(last)
        if saver:
            saver.write(stop)
        on_prefill(pending[0])
    return cache


def save_cache(engine: Engine, cache: DocumentCache, folder: DocumentFolder) -> None:
    """Writes a document that has been read to a folder, or what is missing there."""
    held = tuple(
        layer or rest for layer, rest in zip(cache.layers, without_tails(cache.rest), strict=True)
    )
    manifest = folder.manifest
    saver = _Saver(
        engine, folder, manifest.done // manifest.slice * manifest.slice, manifest.cached
    )
    try:
        for at in range(saver.taken, manifest.cached, manifest.slice):
            saver.take(held, min(at + manifest.slice, manifest.cached))
            saver.write(manifest.cached)
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
        self._next = time.monotonic() + _INTERVAL

    def take(self, cache: KVCache, filled: int) -> None:
        """Takes all slices that end within the first `filled` tokens, or with the document."""
        size, filled = self._folder.manifest.slice, min(filled, self._cached)
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
        if self._written > self._folder.manifest.done and time.monotonic() > self._next:
            self._commit()

    def finish(self) -> None:
        """Writes all slices that were taken, or what the disk has room for."""
        try:
            self.write(self._cached)
        finally:
            self._commit()
        if self._written == self._cached:
            self._folder.end(self._cached)

    def _commit(self) -> None:
        self._folder.commit(self._written)
        self._next = time.monotonic() + _INTERVAL
