"""A stand-in for cuDNN's attention on machines without a GPU."""

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType


def dot_product_attention(
    q, k, v, *, mask_type, qkv_layout, return_residual, q_seqlen=None, kv_seqlen=None
):
    """What is asked of cuDNN: bfloat16 values, a float32 log-sum-exp, nothing of value unasked."""
    assert {x.dtype for x in (q, k, v)} == {jnp.dtype("bfloat16")}
    assert qkv_layout == "BNTH" and return_residual
    rows, heads, queries, _ = q.shape
    keys = k.shape[2]
    at, slots = jnp.arange(queries)[:, None], jnp.arange(keys)
    visible = jnp.ones((rows, queries, keys), bool)
    if mask_type in (MaskType.CAUSAL, MaskType.PADDING_CAUSAL):
        visible &= slots <= at
    if mask_type in (MaskType.PADDING, MaskType.PADDING_CAUSAL):
        assert q_seqlen.dtype == kv_seqlen.dtype == jnp.int32
        assert q_seqlen.shape == kv_seqlen.shape == (rows,)
        visible &= (slots < kv_seqlen[:, None, None]) & (at < q_seqlen[:, None, None])
    k, v = (jnp.repeat(x, heads // k.shape[1], axis=1) for x in (k, v))
    dot = {"preferred_element_type": jnp.float32, "precision": "highest"}
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, **dot)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    # Where nothing is visible cuDNN promises nothing.
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None])
    values = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(q.dtype), v, **dot)
    seen = visible.any(-1)[:, None]
    return (
        jnp.where(seen[..., None], values, jnp.nan).astype(q.dtype),
        jnp.where(seen, lse, jnp.nan),
    )
