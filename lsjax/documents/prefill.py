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
from lsjax.documents.compressed import open_layers, read_layers, save_layers
from lsjax.documents.folder import DocumentFolder
from lsjax.inference.engine import Engine
from lsjax.inference.engine_config import EngineConfig
from lsjax.inference.request import bucket, chunks

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
    on_prefill = on_prefill or (lambda tokens: None)
    tables = engine.tables([document.settled_length or len(document)])
    prefill = functools.partial(_prefill, engine, params, tables, document.token_ids, on_prefill)
    cached, shared = document.cached, document.shared
    if engine.by_layer:
        cache = _compressed(engine, params, tables, document, folder, on_prefill)
    else:
        cache = _in_chunks(engine, document, folder, prefill, on_prefill)
    windows = engine.config.windows
    spec = document_spec(engine.settings, shared - cached)
    spec = dataclasses.replace(spec, chunk=0, policy=None)  # begins anywhere, and keeps all
    rest = tuple(
        own if window is None else layer
        for own, layer, window in zip(engine.cache_of(spec, ()), cache, windows, strict=True)
    )
    read = DocumentCache(shared_layers(cache, windows), np.int32(cached), ())
    return read.replace(rest=prefill(rest, cached, shared, document=read))


def document_spec(settings: EngineConfig, tokens: int) -> CacheSpec:
    """Returns the spec of a cache of a document's tokens, with one row on each data device."""
    rows = settings.mesh.shape["data"]
    if settings.compression:  # so that windows have few sizes, and few programs are compiled
        tokens = bucket(tokens)
    spec = settings.cache_spec(rows, max(tokens, 1), 0)
    if spec.sparse:  # a document's last tokens are not those of a prompt
        spec = dataclasses.replace(spec, sparse=dataclasses.replace(spec.sparse, last_tokens=0))
    return spec


def _in_chunks(engine, document, folder, prefill, on_prefill):
    """Prefills the cached tokens that the folder does not hold, all layers chunk by chunk."""
    cached, start, saver = document.cached, 0, None
    if folder is not None:
        chunk = engine.settings.prefill_chunk
        aligned = math.lcm(document.border, folder.manifest.slice, chunk)
        done = folder.manifest.done
        start = cached if done >= cached else done // aligned * aligned
        saver = _Saver(engine, folder, start, min(cached, folder.manifest.cached))
    spec = document_spec(engine.settings, cached)
    if start:
        cache = engine.cache_of(spec, folder.slices(start))
        on_prefill(start)
    else:
        cache = engine.new_cache(spec)
    try:
        return prefill(cache, start, cached, saver=saver)
    finally:
        if saver:
            saver.finish()


def _compressed(engine, params, tables, document, folder, on_prefill):
    """Reads the cached tokens layer by layer, or opens them if the folder holds them."""
    cached = document.cached
    spec = document_spec(engine.settings, cached)
    if not cached:  # shorter than a block
        return read_layers(engine, params, tables, (), spec, on_prefill)
    if folder is not None and folder.complete:
        layers = open_layers(engine, spec, cached, folder)
        on_prefill(cached)
        return layers
    layers = read_layers(engine, params, tables, document.token_ids[:cached], spec, on_prefill)
    if folder is not None:
        save_layers(engine, layers, cached, folder)
    return layers


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
    if engine.by_layer:
        save_layers(engine, cache.layers, int(cache.length), folder)
        return
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
