"""Queries and keys of a model's layers, as its modules record them."""

import jax
import numpy as np


def queries_and_keys(lm, ids):
    """Queries and keys of a text in each layer of attention, [length, heads, head_dim] float64."""
    tokens, positions = np.asarray(ids)[None], np.arange(len(ids))[None]
    tables = lm.engine.tables([len(ids)])

    @jax.jit
    def run(params):
        return lm.engine.decoder.apply(
            {"params": params}, tokens, positions, tables, None, mutable=["intermediates"]
        )[1]["intermediates"]

    found = run(lm.params)
    layers = [found[f"layers_{i}"]["attn"] for i in lm.config.attention_layers]
    return [[np.asarray(at[n][0][0], np.float64) for n in ("queries", "keys")] for at in layers]
