"""Finds retrieval heads by how they attend to a text of random tokens that repeats itself.

Source: RazorAttention (arXiv 2407.15891), section 3.2.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.attention.blockwise import KeyRange, QueryBlocks
from lsjax.attention.dispatch import attend
from lsjax.attention.kv_array import KVArray
from lsjax.cache import empty_layer
from lsjax.compression.policy import check_no_windows
from lsjax.compression.scores import HeadScores
from lsjax.config import LayerKind
from lsjax.distributed.multihost import to_host
from lsjax.distributed.sequence_layout import CAPACITY_MULTIPLE
from lsjax.distributed.sharding import QUERIES_SPEC
from lsjax.inference.engine import Engine
from lsjax.inference.engine_config import round_up
from lsjax.nn.block import Block
from lsjax.runtime.errors import UserError
from lsjax.runtime.precision import einsum

REPEATS = 4


def repeated_text(start: int, first: int, last: int, length: int, seed: int) -> np.ndarray:
    """Returns [1 + 4 * length] ids: `start`, then `length` random ids, four times over.

    The random ids are from first to last, both included.
    """
    ids = np.random.default_rng(seed).integers(first, last, length, endpoint=True)
    return np.concatenate([[start], np.tile(ids, REPEATS)]).astype(np.int32)


def find_heads(
    engine: Engine, params: dict, text: np.ndarray, on_layer: Callable[[int], object]
) -> HeadScores:
    """Scores every query head of a model on a text of `repeated_text`.

    Layers run one by one, so that the queries and keys of only one layer exist at a time. Only the
    needed entries of the attention matrix and the sum of each row are kept. Recurrent layers have
    no such heads and no scores.

    Args:
      engine: engine of the model; its mesh has a model axis only.
      params: the model's parameters.
      text: [1 + 4 * length] ids.
      on_layer: called with 1 after each layer.

    Raises:
      UserError: the mesh has a context or a data axis, the model has ALiBi or sliding windows, or
        a text as long needs dual chunk attention.
    """
    config, mesh = engine.config, engine.settings.mesh
    check_no_windows("razor", config)
    if config.alibi:
        raise UserError(
            "retrieval heads are found in models with RoPE; with ALiBi a head's reach follows from "
            "its slope and its weights."
        )
    if mesh.shape["context"] > 1 or mesh.shape["data"] > 1:
        raise UserError(
            "heads are found on one text that is not sharded; use a mesh with a model axis only."
        )
    tables = engine.tables([len(text)])
    if tables.chunks is not None:
        raise UserError(
            "retrieval heads are found without dual chunk attention; use a text of at most "
            f"{config.trained_length} tokens."
        )
    platform = mesh.devices.flat[0].platform
    capacity = round_up(len(text), CAPACITY_MULTIPLE)
    settings = dataclasses.replace(
        engine.settings, kv_cache_dtype=engine.settings.dtype, prefill_chunk=capacity
    )
    spec = settings.cache_spec(1, capacity, 1)
    tokens = jnp.asarray(np.pad(text, (0, capacity - len(text)))[None])
    scores_of = jax.shard_map(
        functools.partial(_scores, count=len(text), platform=platform),
        mesh=mesh,
        in_specs=(QUERIES_SPEC, QUERIES_SPEC),
        out_specs=jax.sharding.PartitionSpec(None, "model"),
        check_vma=False,
    )

    def step(kind: LayerKind, layer: dict, x: jax.Array):
        positions = jnp.arange(capacity)[None]
        block = Block(config, mesh, kind)
        inputs = engine.decoder.layer_inputs(tables, positions)[0]
        if kind.recurrence:
            return block.apply({"params": layer}, x, inputs, None)[0], None
        cache = empty_layer(config, spec, platform)
        (x, _), seen = block.apply({"params": layer}, x, inputs, cache, mutable=["intermediates"])
        (q,), (k,) = (seen["intermediates"]["attn"][name] for name in ("queries", "keys"))
        return x, scores_of(q, k)

    run = jax.jit(step, static_argnums=0)
    x = engine.embed(params, tokens)
    rows = []
    for i in range(config.num_layers):
        x, scores = run(config.layers[i], params[f"layers_{i}"], x)
        if scores is not None:
            rows.append(to_host(scores))
        on_layer(1)
    echo, induction = np.stack(rows, axis=1)
    return HeadScores(echo, induction)


def _scores(q: jax.Array, k: jax.Array, *, count: int, platform: str) -> jax.Array:
    """Returns [2, heads] echo and induction scores of the local heads.

    Args:
      q: [1, capacity, heads, head_dim] queries, not yet scaled.
      k: [1, capacity, kv_heads, head_dim] keys.
      count: tokens of the text.
      platform: cpu, gpu (or cuda) or tpu.
    """
    _, capacity, heads, head_dim = q.shape
    kv_heads, length = k.shape[2], (count - 1) // REPEATS
    q = (q * head_dim**-0.5).reshape(1, capacity, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    keys = KVArray(k.swapaxes(1, 2), None)
    at = jnp.arange(capacity)[None]
    key_range, blocks = KeyRange(None, at + 1, at), QueryBlocks(capacity, causal=True)
    lse = attend(platform, q, keys, keys, key_range, None, blocks).lse

    def looked(back: int, on: int) -> jax.Array:
        """Returns [kv_heads, group] sums of the attention from token t to token t - back + on."""
        first = 1 + back
        new, old = slice(first, count), slice(first - back + on, count - back + on)
        score = einsum("bkgtd,bktd->bkgt", q[:, :, :, new], keys.data[:, :, old])
        return jnp.sum(jnp.exp(score - lse[:, :, :, new]), axis=-1)[0]

    backs = [copies * length for copies in range(1, REPEATS)]
    sums = [sum(looked(back, on) for back in backs) for on in (0, 1)]
    return jnp.stack(sums).reshape(2, heads) / (length * (REPEATS - 1))
