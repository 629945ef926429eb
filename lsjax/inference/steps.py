"""The compiled steps of inference, each a pure function of a model and its parameters.

Prefill runs a chunk. The first token is chosen from the prompt's last hidden state. Decode runs a
segment of steps.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lsjax.cache import KVCache
from lsjax.distributed.sharding import CHUNK_SPEC, sharding
from lsjax.inference import prompt_lookup
from lsjax.inference.layerwise_prefill import last_hidden
from lsjax.inference.sampling import likeliest, next_token
from lsjax.inference.sharded_model import ShardedModel
from lsjax.runtime.compilation import Program


@flax.struct.dataclass
class DecodeState:
    """State of decoding, passed from step to step.

    Attributes:
      cache: cache of every token before `token`.
      token: [batch] ids chosen last, not yet in the cache.
      position: [batch] positions of `token`.
      last: [batch] positions of the last tokens to generate. A row that has reached it, or has
        chosen an end-of-sequence token, is done and stays as it is.
      step: number of tokens chosen so far per row.
      seen: [batch, vocab] whether the row contains an id before `token`; None if there is no
        repetition penalty.
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    last: jax.Array
    step: jax.Array
    seen: jax.Array | None = None


@flax.struct.dataclass
class LookupState:
    """State of decoding with prompt lookup, passed from step to step.

    Attributes:
      cache: cache of every token before each row's position.
      tokens: [batch, room] ids of each row; undefined after its position.
      position: [batch] position of each row's last known token.
      last: [batch] position of the last token to generate in each row.
    """

    cache: KVCache
    tokens: jax.Array
    position: jax.Array
    last: jax.Array


def _run(model, params, tokens, positions, tables, cache, lengths=None, decode=False):
    return model.decoder.apply(
        {"params": params}, tokens, positions, tables, cache, lengths, decode
    )


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
    parts = sharding(model.mesh, CHUNK_SPEC)
    return tuple(jax.lax.with_sharding_constraint(x, parts) for x in (tokens, positions))


def _prefill(model, params, tables, cache, tokens, start, lengths, last):
    tokens, positions = _in_zigzag_order(model, tokens, start)
    hidden, cache = _run(model, params, tokens, positions, tables, cache, lengths)
    return cache, last_hidden(hidden, positions, lengths, last)


def _score(model, params, tables, cache, tokens, start):
    tokens, positions = _in_zigzag_order(model, tokens, start)
    hidden, cache = _run(model, params, tokens, positions, tables, cache)
    if model.zigzag.devices > 1:
        hidden = hidden[:, np.argsort(model.zigzag.permutation(hidden.shape[1]))]
    return cache, _logits(model, params, hidden)


def _embed(model, params, tokens):
    tokens, _ = _in_zigzag_order(model, tokens, 0)
    return model.decoder.apply({"params": params}, tokens, method="embed_tokens")


def _for_samples(model, params, cache, last, *, samples):
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), (cache, last))


def _first(model, params, last, draw, seen):
    return next_token(_logits(model, params, last[:, None])[:, 0], draw, jnp.int32(0), seen)


def _run_segment(step, state, done, outputs, steps):
    """Runs decode steps until all rows are done, at most a segment.

    Args:
      step: state -> (state, outputs).
      state: state before the first step.
      done: state -> [batch] whether rows are done.
      outputs: shapes and dtypes of what a step returns beside the state.
      steps: length of the segment.

    Returns:
      The state, the outputs as [steps, ...] and the number of steps that were run.
    """

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~jnp.all(done(state))

    def body(carry):
        i, state, all_outputs = carry
        state, new = step(state)
        return i + 1, state, jax.tree.map(lambda x, y: x.at[i].set(y), all_outputs, new)

    empty = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), outputs)
    count, state, found = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, empty))
    return state, found, count


def _decode(model, params, tables, state, draw, eos, *, steps):
    def done(state: DecodeState) -> jax.Array:
        return (state.position >= state.last) | jnp.isin(state.token, eos)

    def step(state: DecodeState) -> tuple[DecodeState, jax.Array]:
        tokens, positions = state.token[:, None], state.position[:, None]
        hidden, cache = _run(model, params, tokens, positions, tables, state.cache, decode=True)
        seen = state.seen
        if seen is not None:
            seen = seen.at[jnp.arange(seen.shape[0]), state.token].set(True)
        token = next_token(_logits(model, params, hidden)[:, 0], draw, state.step, seen)
        stay = done(state)
        token = jnp.where(stay, state.token, token)
        position = jnp.where(stay, state.position, state.position + 1)
        state = DecodeState(cache, token, position, state.last, state.step + 1, seen)
        return state, token

    state, tokens, count = _run_segment(step, state, done, state.token, steps)
    return state, (tokens.T, count)


def _teacher_forced_decode(model, params, tables, cache, tokens, position):
    def step(carry, token):
        cache, at = carry
        positions = jnp.broadcast_to(at, token.shape)[:, None]
        hidden, cache = _run(model, params, token[:, None], positions, tables, cache, decode=True)
        return (cache, at + 1), _logits(model, params, hidden)[:, 0]

    (cache, _), scores = jax.lax.scan(step, (cache, position), tokens.T)
    return cache, scores.swapaxes(0, 1)


def _lookup(model, params, tables, state, eos, *, steps, drafted):
    def step(state: LookupState) -> tuple[LookupState, tuple[jax.Array, jax.Array]]:
        at = state.position[:, None]
        draft = prompt_lookup.draft(state.tokens, state.position, drafted)
        tokens = jnp.take_along_axis(state.tokens, at, axis=1)
        tokens = jnp.concatenate([tokens, draft], axis=1)
        positions = at + jnp.arange(drafted + 1)
        hidden, cache = _run(model, params, tokens, positions, tables, state.cache, decode=True)
        chosen = likeliest(_logits(model, params, hidden))
        new = jnp.minimum(prompt_lookup.num_accepted(draft, chosen), state.last - state.position)
        if float_tail := cache[0].float_tail:  # logits past the current block are undefined
            new = jnp.minimum(new, float_tail.block - state.position % float_tail.block)
        put = jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
        position = state.position + new
        ended = jnp.isin(chosen, eos) & (jnp.arange(drafted + 1) < new[:, None])
        state = state.replace(
            cache=cache,
            tokens=put(state.tokens, chosen, state.position + 1, 0),
            position=position,
            last=jnp.where(jnp.any(ended, axis=1), position, state.last),
        )
        return state, (chosen, new)

    rows = state.position
    outputs = jax.ShapeDtypeStruct((*rows.shape, drafted + 1), jnp.int32), rows
    state, (tokens, counts), count = _run_segment(
        step, state, lambda state: state.position >= state.last, outputs, steps
    )
    return state, (tokens.swapaxes(0, 1), counts.T, count)


def _decode_state_shardings(model: ShardedModel) -> tuple[DecodeState, tuple]:
    rows = model.rows
    state = DecodeState(
        cache=model.cache_after_step,
        token=rows,
        position=rows,
        last=rows,
        step=model.replicated,
        seen=rows,
    )
    return state, (rows, model.replicated)


def _lookup_state_shardings(model: ShardedModel) -> tuple[LookupState, tuple]:
    rows = model.rows
    state = LookupState(cache=model.cache, tokens=rows, position=rows, last=rows)
    return state, (rows, rows, model.replicated)


# Arguments and results are those of Engine's methods of the same names, with `model` first.
prefill = Program(_prefill, lambda m: (m.cache_after_step, m.rows), donate_argnums=2)
score = Program(_score, lambda m: (m.cache, m.rows), donate_argnums=2)
embed = Program(_embed, lambda m: sharding(m.mesh, CHUNK_SPEC))
for_samples = Program(_for_samples, lambda m: (m.cache_after_step, m.rows))
first = Program(_first, lambda m: m.rows)
decode = Program(_decode, _decode_state_shardings, donate_argnums=2)
teacher_forced_decode = Program(
    _teacher_forced_decode, lambda m: (m.cache_after_step, m.rows), donate_argnums=2
)
decode_with_lookup = Program(_lookup, _lookup_state_shardings, donate_argnums=2)
