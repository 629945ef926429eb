"""How often the model reads the pass key, at lengths and scalings of one's choice."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.cache import CacheSpec, KVCache, empty_cache
from lsjax.config import ModelConfig, RopeScaling
from lsjax.nn.decoder import Decoder
from lsjax.positions.rotary import RotaryTables, rotary_tables
from lsjax.sharding import make_mesh, parse_mesh
from lsjax.shipped.model import ANSWER_TOKENS, TRAINED_LENGTH, tokens_of
from lsjax.shipped.passages import Passage, make_passage

SCALINGS = ("default", "linear", "dynamic", "yarn")
_CHUNK = 512
_ROWS = 20  # passages run together


def scaling_for(kind: str, length: int) -> RopeScaling:
    """The scaling of a kind that serves `length` tokens; dynamic scaling finds out by itself."""
    factor = 1.0 if kind in ("default", "dynamic") else max(1.0, length / TRAINED_LENGTH)
    return RopeScaling(kind=kind, factor=factor, original_length=TRAINED_LENGTH)


def held_out_passages(length: int, count: int) -> list[Passage]:
    """Passages that training did not see, their pass keys spread evenly over the depth.

    Args:
      length: of each prompt, in tokens.
      count: how many.
    """
    depths = np.linspace(0, 1, count)
    return [make_passage(f"held out {i}", length, depth) for i, depth in enumerate(depths)]


def share_right(
    config: ModelConfig, params: dict, passages: Sequence[Passage], scaling: RopeScaling
) -> float:
    """The share of passages of one length that are answered right, word for word and to the end.

    Args:
      config: the model.
      params: its parameters, float32.
      passages: all of one length.
      scaling: in place of the model's own.
    """
    rows = [passages[i : i + _ROWS] for i in range(0, len(passages), _ROWS)]
    return float(np.concatenate([_are_right(config, params, r, scaling) for r in rows]).mean())


def _are_right(
    config: ModelConfig, params: dict, passages: Iterable[Passage], scaling: RopeScaling
) -> np.ndarray:
    """[batch] booleans.

    Each token of the answer must be the likeliest after the right ones before it, which is when
    greedy decoding gives the whole answer.
    """
    tokens = np.stack([tokens_of(passage) for passage in passages])
    inputs, answer = tokens[:, :-1], tokens[:, -ANSWER_TOKENS:]
    batch, length = inputs.shape
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    tables = rotary_tables(scaled, [length] * batch)
    decoder = Decoder(config, make_mesh(parse_mesh("")), jnp.float32)
    cache = empty_cache(config, CacheSpec(batch, -(-length // _CHUNK) * _CHUNK, "float32"))
    best = []
    for start in range(0, length, _CHUNK):
        cache, tops = _run(decoder, params, inputs[:, start : start + _CHUNK], start, tables, cache)
        best.append(tops)
    return (np.concatenate(best, axis=1)[:, -ANSWER_TOKENS:] == answer).all(axis=1)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def _run(
    decoder: Decoder,
    params: dict,
    tokens: jax.Array,
    start: jax.Array,
    tables: RotaryTables,
    cache: KVCache,
) -> tuple[KVCache, jax.Array]:
    """Runs tokens that stand at start ..; returns the likeliest token after each."""
    positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = decoder.apply({"params": params}, tokens, positions, tables, cache)
    logits = decoder.apply({"params": params}, hidden, method="logits")
    return cache, jnp.argmax(logits, axis=-1)
