"""Prefill of a document, saved while it goes on, and documents from and to the disk."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.cache import (
    CacheSpec,
    DocumentCache,
    KVCache,
    States,
    shared_layers,
    snapshot,
    snapshot_bytes,
    states_of,
    with_states,
)
from lsjax.documents.compressed import open_layers, read_layers, save_layers
from lsjax.documents.folder import DocumentFolder
from lsjax.inference.engine import Engine
from lsjax.inference.engine_config import EngineConfig
from lsjax.inference.request import bucket, chunks
from lsjax.inference.sparsity import measure

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
) -> "Document":
    """Prefills a document, or what the folder does not hold of it; returns it with its cache.

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
    cached, shared, sparsity = document.cached, document.shared, None
    if engine.by_layer:
        cache = _compressed(engine, params, tables, document, folder, on_prefill)
    else:
        cache, start = _in_chunks(engine, document, folder, prefill, on_prefill)
        sparsity = measure(cache, engine.config, [cached], start)
    kinds = engine.config.layers
    spec = document_spec(engine.settings, shared - cached)
    spec = dataclasses.replace(spec, chunk=0, policy=None)  # begins anywhere, and keeps all
    rest = tuple(
        own if kind.keeps_all else layer
        for own, layer, kind in zip(engine.cache_of(spec, ()), cache, kinds, strict=True)
    )
    states = _copied(states_of(cache))  # those in `rest` go on to its end
    read = DocumentCache(shared_layers(cache, kinds), np.int32(cached), (), states)
    read = read.replace(rest=prefill(rest, cached, shared, document=read))
    return dataclasses.replace(document, cache=read, sparsity=sparsity)


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
    """Prefills the cached tokens that the folder does not hold, all layers chunk by chunk.

    Returns:
      The cache, and the number of leading tokens that the folder holds.
    """
    cached, start, saver = document.cached, 0, None
    spec = document_spec(engine.settings, cached)
    states = states_of(engine.cache_shapes(spec))
    if folder is not None:
        manifest = folder.manifest
        aligned = math.lcm(document.border, manifest.slice, engine.settings.prefill_chunk)
        if states:
            start = manifest.last_state(cached, document.border)
        else:
            start = cached if manifest.done >= cached else manifest.done // aligned * aligned
        if not folder.complete:
            saver = _Saver(engine, folder, start, min(cached, manifest.cached), document.border)
    if start:
        held = folder.read_snapshot(start, snapshot_bytes(states)) if states else None
        cache = engine.cache_of(spec, folder.slices(start), held)
        on_prefill(start)
    else:
        cache = engine.new_cache(spec)
    try:
        return prefill(cache, start, cached, saver=saver), start
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
    for at, size in _chunks_from(start, stop, settings, anywhere=document is not None):
        part = ids[at : min(at + size, stop)]
        tokens = np.zeros((rows, size), np.int32)
        tokens[:, : len(part)] = part
        cache, last = engine.prefill(params, tables, cache, tokens, at, lengths, last, document)
        if saver:
            saver.take(cache, at + len(part))
            saver.take_states(cache, at + len(part))
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


def _chunks_from(
    start: int, stop: int, settings: EngineConfig, anywhere: bool
) -> Iterator[tuple[int, int]]:
    """Yields the start and the size of each chunk of the tokens start .. stop - 1.

    Unless they may start anywhere, smaller ones lead up to a multiple of the chunk.
    """
    chunk = settings.prefill_chunk
    while start % chunk and start < stop and not anywhere:
        size = math.gcd(start, chunk)
        yield start, size
        start += size
    for at, size in chunks(max(stop - start, 0), chunk, settings.zigzag.block_length):
        yield start + at, size


def save_cache(engine: Engine, cache: DocumentCache, folder: DocumentFolder) -> None:
    """Writes a document that has been read to a folder, or what is missing there."""
    held = tuple(layer or rest for layer, rest in zip(cache.layers, cache.rest, strict=True))
    held = with_states(held, cache.states)
    if engine.by_layer:
        save_layers(engine, held, int(cache.length), folder)
        return
    manifest, size = folder.manifest, folder.manifest.slice
    cached = min(int(cache.length), manifest.cached)
    saver = _Saver(engine, folder, manifest.done // size * size, cached, size)
    try:
        for at in range(saver.taken, cached, size):
            saver.take(held, min(at + size, cached))
            saver.write(cached)
        if cached == cache.length:
            saver.take_states(held, cached)
    finally:
        saver.finish()


class _Saver:
    """Takes slices from the cache as soon as they are complete, and writes them a little later.

    Attributes:
      taken: number of tokens taken so far.
    """

    def __init__(
        self, engine: Engine, folder: DocumentFolder, start: int, cached: int, border: int
    ):
        self._engine, self._folder, self._cached = engine, folder, cached
        self.taken = self._written = start // folder.manifest.slice * folder.manifest.slice
        self._border = border  # what the positions of snapshots are multiples of, but the end
        self._slices: list = []
        self._states: list = []
        self._next = time.monotonic() + _INTERVAL

    def take(self, cache: KVCache, filled: int) -> None:
        """Takes all slices that end within the first `filled` tokens, or with the document."""
        size, filled = self._folder.manifest.slice, min(filled, self._cached)
        while self.taken < filled and (self.taken + size <= filled or filled == self._cached):
            self._slices.append((self.taken, self._engine.read_tokens(cache, self.taken, size)))
            self.taken = min(self.taken + size, self._cached)

    def take_states(self, cache: KVCache, filled: int) -> None:
        """Takes the states after `filled` tokens of a cache, if reading may go on there."""
        states = states_of(cache)
        if states and (filled == self._cached or filled % self._border == 0):
            self._states.append((filled, _copied(states)))

    def write(self, computed: int) -> None:
        """Writes the slices within the first `computed` tokens, which are there by now."""
        size = self._folder.manifest.slice
        while self._slices and min(self._slices[0][0] + size, self._cached) <= computed:
            start, tokens = self._slices.pop(0)
            self._folder.append(tokens, start)
            self._written = min(start + size, self._cached)
        while len(self._states) > 1 and self._states[1][0] <= self._written:
            self._states.pop(0)  # only the last ones that tokens are written up to are recorded
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
        last = None
        if self._states and self._states[0][0] <= self._written:
            at, states = self._states.pop(0)
            last = at, snapshot(states)
        self._folder.commit(self._written, last)
        self._next = time.monotonic() + _INTERVAL


def _copied(states: States) -> States:
    return jax.tree.map(jnp.copy, states)  # the next chunk is given the memory of the first ones
