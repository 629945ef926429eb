"""A stand-in for cuDNN's attention on machines without a GPU."""

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import AttentionLayout, MaskType


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


class AttentionBackward:
    """The primitive of cuDNN's backward pass, with a global output and log-sum-exp."""

    @staticmethod
    def bind(q, k, v, bias, q_seqlen, kv_seqlen, *rest, mask_type, layout, scale, **_):
        """What is asked of cuDNN: bfloat16 gradients, nothing of value for hidden keys."""
        *_, lse, out, d_out = rest
        assert {x.dtype for x in (q, k, v, out, d_out)} == {jnp.dtype("bfloat16")}
        assert lse.dtype == jnp.float32 and lse.shape == q.shape[:3]
        assert mask_type == MaskType.PADDING and layout == AttentionLayout.BNTH.value
        assert q_seqlen.dtype == kv_seqlen.dtype == jnp.int32 and bias.size == 0 and scale == 1
        rows, heads, queries, head_dim = q.shape
        kv_heads, keys = k.shape[1:3]
        dot = {"preferred_element_type": jnp.float32, "precision": "highest"}
        q, out, d_out = (x.reshape(rows, kv_heads, -1, queries, head_dim) for x in (q, out, d_out))
        scores = jnp.einsum("bkgqd,bksd->bkgqs", q, k, **dot)
        seen = jnp.arange(keys) < kv_seqlen[:, None]
        weights = jnp.exp(scores - lse.reshape(scores.shape[:-1])[..., None])
        weights = jnp.where(seen[:, None, None, None], weights, 0)
        delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
        d_scores = weights * (jnp.einsum("bkgqd,bksd->bkgqs", d_out, v, **dot) - delta[..., None])
        weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
        d_q = jnp.einsum("bkgqs,bksd->bkgqd", d_scores, k, **dot).reshape(rows, heads, queries, -1)
        d_k = jnp.einsum("bkgqs,bkgqd->bksd", d_scores, q, **dot)
        d_v = jnp.einsum("bkgqs,bkgqd->bksd", weights, d_out, **dot)
        d_k, d_v = (jnp.where(seen[:, None, :, None], x, jnp.nan) for x in (d_k, d_v))
        return [x.astype(q.dtype) for x in (d_q, d_k, d_v)]
