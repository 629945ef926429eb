"""The compiled steps of inference, each a pure function of a model and its parameters.

Prefill runs a chunk. The first token is chosen from the prompt's last hidden state. Decode runs a
segment of steps.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lsjax.cache import (
    KVCache,
    attach,
    detach,
    take_tokens,
)
from lsjax.inference import prompt_lookup
from lsjax.inference.layerwise_prefill import last_hidden
from lsjax.inference.sampling import likeliest, next_token
from lsjax.inference.sharded_model import ShardedModel
from lsjax.nn.layer_modules import keep_accepted
from lsjax.runtime.compilation import Program


@flax.struct.dataclass
class DecodeState:
    """State of decoding, passed from step to step.

    Attributes:
      cache: cache of every token before `token`.
      token: [batch] ids chosen last, not yet in the cache.
      position: [batch] positions of `token`.
      last: [batch] positions of the last tokens to generate. A row that has reached it is done and
        stays as it is; an end-of-sequence token brings it forward.
      step: number of tokens chosen so far per row that is not done.
      seen: [batch, vocab] whether the row contains an id before `token`; None if there is no
        repetition penalty.
      text: [batch, room] ids of each row up to `token`, to draft from; later ones are undefined.
        None if nothing is drafted.
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    last: jax.Array
    step: jax.Array
    seen: jax.Array | None = None
    text: jax.Array | None = None

    @property
    def done(self) -> jax.Array:
        return self.position >= self.last


def _run(
    model, params, tokens, positions, tables, cache, lengths=None, decode=False, document=None
):
    cache = attach(cache, document)
    hidden, cache = model.decoder.apply(
        {"params": params}, tokens, positions, tables, cache, lengths, decode
    )
    return hidden, model.as_cache(detach(cache))


def _logits(model, params, hidden):
    return model.decoder.apply({"params": params}, hidden, method="logits")


def _in_zigzag_order(
    model: ShardedModel, tokens: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Shards a chunk's tokens over the context axis in zigzag order; also returns positions."""
    zigzag = model.zigzag
    positions = zigzag.chunk_positions(start, *tokens.shape)
    if zigzag.devices == 1:
        return tokens, positions
    tokens = tokens[:, zigzag.permutation(tokens.shape[1])]
    return model.as_chunk(tokens), model.as_chunk(positions)


def _prefill(model, params, tables, cache, tokens, start, lengths, last, document=None):
    tokens, positions = _in_zigzag_order(model, tokens, start)
    hidden, cache = _run(
        model, params, tokens, positions, tables, cache, lengths, document=document
    )
    return cache, model.by_row(last_hidden(hidden, positions, lengths, last))


def _score(model, params, tables, cache, tokens, start, lengths):
    tokens, positions = _in_zigzag_order(model, tokens, start)
    hidden, cache = _run(model, params, tokens, positions, tables, cache, lengths)
    if model.zigzag.devices > 1:
        hidden = hidden[:, np.argsort(model.zigzag.permutation(hidden.shape[1]))]
    return cache, model.by_row(_logits(model, params, hidden))


def _embed(model, params, tokens):
    tokens, _ = _in_zigzag_order(model, tokens, 0)
    return model.as_chunk(model.decoder.apply({"params": params}, tokens, method="embed_tokens"))


def _read_tokens(model, layers, start, *, size):
    specs = tuple(layer.partition_specs() for layer in layers)
    tokens = take_tokens(model.mesh, layers, specs, start, size)
    return jax.lax.with_sharding_constraint(tokens, model.replicated)


def _for_samples(model, cache, last, *, samples):
    cache, last = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), (cache, last))
    return model.as_cache(cache), model.by_row(last)


def _first(model, params, hidden, position, last, draw, eos, seen, text):
    logits = _logits(model, params, hidden[:, None])[:, 0]
    token = next_token(logits, draw, jnp.int32(0), seen)
    last = jnp.where(jnp.isin(token, eos), position, last)
    return model.by_row((token, last, _put(text, token[:, None], position)))


def _put(text: jax.Array | None, ids: jax.Array, position: jax.Array) -> jax.Array | None:
    """Writes ids [batch, count] of each row from a position on."""
    if text is None:
        return None
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
        text, ids, position, 0
    )


def _run_next(model, params, tables, cache, tokens, position, document=None):
    """Runs each row's next tokens [batch, count], the first at `position`; also returns logits."""
    positions = position[:, None] + jnp.arange(tokens.shape[1])
    hidden, cache = _run(
        model, params, tokens, positions, tables, cache, decode=True, document=document
    )
    return cache, _logits(model, params, hidden)


def _decode_step(model, params, tables, state, draw, eos, drafted, document):
    """Runs each row's last token and `drafted` drafts after it.

    Returns:
      The new state, [batch, drafted + 1] chosen ids, and [batch] how many of them are accepted.
    """
    tokens = state.token[:, None]
    if drafted:
        draft = prompt_lookup.draft(state.text, state.position, drafted)
        tokens = jnp.concatenate([tokens, draft], axis=1)
    cache, logits = _run_next(model, params, tables, state.cache, tokens, state.position, document)
    seen = state.seen
    new = state.last - state.position  # 0 in rows that are done
    if drafted:
        chosen = likeliest(logits)
        new = jnp.minimum(prompt_lookup.num_accepted(draft, chosen), new)
        # Logits past the first token's block are undefined.
        if block := next((layer.block for layer in cache if layer.block), None):
            new = jnp.minimum(new, block - state.position % block)
        cache = keep_accepted(cache, new)
    else:
        if seen is not None:
            seen = seen.at[jnp.arange(seen.shape[0]), state.token].set(True)
        chosen = next_token(logits[:, 0], draw, state.step, seen)[:, None]
        new = jnp.minimum(1, new)
    accepted = jnp.arange(drafted + 1) < new[:, None]
    ended = jnp.any(jnp.isin(chosen, eos) & accepted, axis=1)
    newest = jnp.take_along_axis(chosen, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0]
    position = state.position + new
    state = DecodeState(
        cache=cache,
        token=jnp.where(new > 0, newest, state.token),
        position=position,
        last=jnp.where(ended, position, state.last),
        step=state.step + 1,
        seen=seen,
        text=_put(state.text, chosen, state.position + 1),
    )
    return state, (chosen, new)


def _decode(model, params, tables, state, draw, eos, document=None, *, steps, drafted):
    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.done)

    def body(carry):
        i, state, outputs = carry
        state, new = _decode_step(model, params, tables, state, draw, eos, drafted, document)
        return i + 1, state, jax.tree.map(lambda x, y: x.at[i].set(y), outputs, new)

    batch = state.token.shape[0]
    empty = jnp.zeros((steps, batch, drafted + 1), jnp.int32), jnp.zeros((steps, batch), jnp.int32)
    count, state, outputs = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, empty))
    outputs = model.by_row(jax.tree.map(lambda x: x.swapaxes(0, 1), outputs))
    rows = model.by_row(state.replace(cache=None, step=None))
    return rows.replace(cache=model.as_cache(state.cache), step=state.step), (*outputs, count)


def _teacher_forced_decode(model, params, tables, cache, tokens, position):
    def step(carry, token):
        cache, at = carry
        cache, logits = _run_next(model, params, tables, cache, token[:, None], at)
        return (cache, at + 1), logits[:, 0]

    position = jnp.broadcast_to(position, tokens.shape[:1])
    (cache, _), scores = jax.lax.scan(step, (cache, position), tokens.T)
    return model.as_cache(cache), model.by_row(scores.swapaxes(0, 1))


# Arguments and results are those of Engine's methods of the same names, with `model` first.
prefill = Program(_prefill, donate_argnames=["cache"])
score = Program(_score, donate_argnames=["cache"])
embed = Program(_embed)
read_tokens = Program(_read_tokens, static_argnames=["size"])
for_samples = Program(_for_samples, static_argnames=["samples"])
first = Program(_first)
decode = Program(_decode, donate_argnames=["state"], static_argnames=["steps", "drafted"])
teacher_forced_decode = Program(_teacher_forced_decode, donate_argnames=["cache"])
