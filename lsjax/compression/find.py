"""Which heads retrieve: how they look at a text of random tokens that repeats itself.

Source: RazorAttention (arXiv 2407.15891), section 3.2.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.attention.blockwise import Seen
from lsjax.attention.by_platform import attend
from lsjax.cache import GRANULE, Store, empty_layer
from lsjax.compression.razor import check_compresses
from lsjax.compression.scores import HeadScores
from lsjax.engine import Engine
from lsjax.errors import UserError
from lsjax.hosts import to_host
from lsjax.nn.block import Block
from lsjax.positions.rotary import cos_sin
from lsjax.precision import einsum
from lsjax.requests import cache_spec, round_up
from lsjax.sharding import QUERIES

REPEATS = 4


def repeated_text(start: int, first: int, last: int, length: int, seed: int) -> np.ndarray:
    """[1 + 4 * length] ids: `start`, then `length` random ones from first to last, four times."""
    ids = np.random.default_rng(seed).integers(first, last, length, endpoint=True)
    return np.concatenate([[start], np.tile(ids, REPEATS)]).astype(np.int32)


def find_heads(
    engine: Engine, params: dict, text: np.ndarray, on_layer: Callable[[int], object]
) -> HeadScores:
    """Scores every query head of a model on a text of `repeated_text`.

    Layer by layer, so that the queries and keys of one layer only are there at a time; of the
    attention matrix only the few entries that are asked for, and the sum of each row.

    Args:
      engine: of the model; its mesh has no context axis.
      params: the model's.
      text: [1 + 4 * length] ids.
      on_layer: called with 1 after each layer.

    Raises:
      UserError: there is a context or a data axis, or the model is compressed otherwise.
    """
    config, mesh = engine.config, engine.mesh
    check_compresses(config)
    if config.alibi:
        raise UserError(
            "heads that retrieve are found in models that rotate; with ALiBi a head's reach "
            "follows from its slope and its weights."
        )
    if mesh.shape["context"] > 1 or mesh.shape["data"] > 1:
        raise UserError(
            "heads are found on one text that lies whole on each device; use a mesh with a model "
            "axis only."
        )
    platform = mesh.devices.flat[0].platform
    capacity = round_up(len(text), GRANULE)
    spec = cache_spec(mesh, 1, capacity, 1, capacity, engine.dtype, engine.dtype)
    tokens = jnp.asarray(np.pad(text, (0, capacity - len(text)))[None])
    tables = engine.tables([len(text)])
    scores_of = jax.shard_map(
        functools.partial(_scores, count=len(text), platform=platform),
        mesh=mesh,
        in_specs=(QUERIES, QUERIES),
        out_specs=jax.sharding.PartitionSpec(None, "model"),
        check_vma=False,
    )

    def step(layer: dict, x: jax.Array):
        positions = jnp.arange(capacity)[None]
        block = Block(config, mesh, None)
        cache = empty_layer(config, spec, platform)
        angles = cos_sin(tables, positions)
        (x, _), seen = block.apply(
            {"params": layer}, x, positions, angles, cache, None, False, mutable=["intermediates"]
        )
        (q,), (k,) = (seen["intermediates"]["attn"][name] for name in ("queries", "keys"))
        return x, scores_of(q, k)

    run = jax.jit(step)
    x = engine.embed(params, tokens)
    rows = []
    for i in range(config.num_layers):
        x, scores = run(params[f"layers_{i}"], x)
        rows.append(to_host(scores))
        on_layer(1)
    echo, induction = np.stack(rows, axis=1)
    return HeadScores(echo, induction)


def _scores(q: jax.Array, k: jax.Array, *, count: int, platform: str) -> jax.Array:
    """[2, heads] echo and induction of a device's heads.

    Args:
      q: [1, capacity, heads, head_dim], not yet scaled.
      k: [1, capacity, kv_heads, head_dim].
      count: tokens that the text has.
      platform: cpu, gpu (or cuda) or tpu.
    """
    _, capacity, heads, head_dim = q.shape
    kv_heads, length = k.shape[2], (count - 1) // REPEATS
    q = (q * head_dim**-0.5).reshape(1, capacity, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    keys = Store(k.swapaxes(1, 2), None)
    at = jnp.arange(capacity)[None]
    lse = attend(platform, q, keys, keys, Seen(None, at + 1, at), None).lse

    def looked(back: int, on: int) -> jax.Array:
        """[kv_heads, group] weight that tokens give the one `back` before, and `on` after that."""
        first = 1 + back
        new, old = slice(first, count), slice(first - back + on, count - back + on)
        score = einsum("bkgtd,bktd->bkgt", q[:, :, :, new], keys.data[:, :, old])
        return jnp.sum(jnp.exp(score - lse[:, :, :, new]), axis=-1)[0]

    backs = [copies * length for copies in range(1, REPEATS)]
    sums = [sum(looked(back, on) for back in backs) for on in (0, 1)]
    return jnp.stack(sums).reshape(2, heads) / (length * (REPEATS - 1))
