"""What sparse prefill has attended to, as its caches have counted it."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lsjax.attention.sparse.rule import TILE
from lsjax.cache import KVCache, SparseCache, without_tails
from lsjax.config import ModelConfig
from lsjax.distributed.multihost import to_host


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """What the prompts of one or more batches have attended to.

    Attributes:
      density: pairs of queries and keys that were attended to, relative to full attention, over all
        layers of attention without a sliding window, the dense ones included.
      pairs: those of full attention, in blocks of queries and keys.
      samples: sampled queries of each layer.
      kept_mass: share of full attention's weights that was on what sampled queries attended to,
        averaged over the heads of sparse layers; None if none was sampled.
      least_mass: the average of the head where it is least.
      least_head: that head's layer and number, from 0.
    """

    density: float
    pairs: float
    samples: int
    kept_mass: float | None = None
    least_mass: float | None = None
    least_head: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.kept_mass is None:
            return f"{self.density:.1%} of full attention"
        layer, head = self.least_head
        return (
            f"{self.density:.1%} of full attention, with {self.kept_mass:.2%} of its weights by "
            f"{self.samples} queries, {self.least_mass:.1%} in layer {layer}, head {head}"
        )


# Is told what prompts have attended to, once per batch, if that was not everything.
OnSparsity = Callable[[Sparsity], object]


def measure(
    cache: KVCache, config: ModelConfig, lengths: Sequence[int], start: int = 0
) -> Sparsity | None:
    """Returns what prefill has attended to; None if it was not sparse.

    Args:
      cache: cache after prefill.
      config: model configuration.
      lengths: number of tokens of each prompt; rows after those are padding.
      start: number of leading tokens, a multiple of TILE, that came with the cache.
    """
    attention = zip(config.attention_layers, without_tails(cache), strict=True)
    layers = {i: x for i, x in attention if isinstance(x, SparseCache)}
    if not layers or max(lengths) <= start:
        return None
    rows = len(lengths)
    counts = {i: jax.tree.map(lambda x: to_host(x)[:rows], x.counts) for i, x in layers.items()}
    tiles = -(-np.asarray(lengths, np.float64) // TILE)
    before = start // TILE
    full = float(np.sum(tiles * (tiles + 1) - before * (before + 1)) / 2)  # of one head
    whole = sum(window is None for window in config.attention_windows)
    sparse = sum(float(x.blocks.astype(np.float64).mean(axis=1).sum()) for x in counts.values())
    density = ((whole - len(layers)) * full + sparse) / (whole * full)
    samples = int(next(iter(counts.values())).samples.sum())
    if not samples:
        return Sparsity(density, full, 0)
    mass = {i: x.mass.sum(axis=0).ravel() / samples for i, x in counts.items()}
    layer, head = min(
        ((i, int(heads.argmin())) for i, heads in mass.items()), key=lambda at: mass[at[0]][at[1]]
    )
    return Sparsity(
        density=density,
        pairs=full,
        samples=samples,
        kept_mass=float(np.mean([heads.mean() for heads in mass.values()])),
        least_mass=float(mass[layer][head]),
        least_head=(layer, head),
    )


def combine(found: Sequence[Sparsity]) -> Sparsity:
    """Combines those of batches that ran one after the other; the least mass is that of a batch."""
    pairs, sampled = sum(x.pairs for x in found), [x for x in found if x.samples]
    density = sum(x.density * x.pairs for x in found) / pairs
    if not sampled:
        return Sparsity(density, pairs, 0)
    samples = sum(x.samples for x in sampled)
    least = min(sampled, key=lambda x: x.least_mass)
    kept_mass = sum(x.kept_mass * x.samples for x in sampled) / samples
    return Sparsity(density, pairs, samples, kept_mass, least.least_mass, least.least_head)
