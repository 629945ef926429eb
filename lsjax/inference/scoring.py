"""Scoring: logits and losses of given tokens, prefilled in chunks or decoded one by one."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.distributed.multihost import to_host
from lsjax.distributed.sequence_layout import round_up_to_blocks
from lsjax.inference.engine import Engine
from lsjax.inference.engine_config import round_up
from lsjax.inference.generate import teacher_forced_scores
from lsjax.inference.prompts import as_rows
from lsjax.inference.request import Request, check_ids
from lsjax.inference.sampling import Sampling
from lsjax.inference.sparse_prefill import tile_multiple
from lsjax.inference.sparsity import OnSparsity, measure
from lsjax.runtime.errors import UserError


def prompt_logits(
    engine: Engine,
    params: dict,
    token_ids: Any,
    chunk_size: int | None,
    on_sparsity: OnSparsity | None = None,
) -> Iterator[jax.Array]:
    """Yields the logits of each chunk in turn, [batch, up to chunk, vocab_size] float32.

    Args:
      engine: engine of the model.
      params: model parameters.
      token_ids: [batch, length] or [length] ids.
      chunk_size: tokens per prefill step; None for prefill_chunk.
      on_sparsity: told at the end what the tokens attended to; see OnSparsity.

    Raises:
      UserError: the model has no embedding for an id, or its compression does not score prompts.
    """
    settings = engine.settings
    if settings.compression and not settings.compression.scores_prompts:
        raise UserError(
            "scores of a prompt's own tokens do not show what a compressed cache costs. Score "
            "what is decoded after a prompt (teacher_forced_nll, --prompt_length), or leave "
            "out kv_compression."
        )
    ids = _checked_rows(engine.config, token_ids)
    batch, length = ids.shape
    chunk = min(chunk_size or settings.prefill_chunk, length)
    context = settings.mesh.shape["context"]
    chunk = round_up_to_blocks(chunk, context)
    if settings.sparse_prefill:
        chunk = round_up(chunk, tile_multiple(context))
    settings = dataclasses.replace(settings, prefill_chunk=chunk)
    engine = Engine(engine.config, settings)
    cache = engine.new_cache(settings.cache_spec(batch, length, 0))
    tables = engine.tables([length] * batch)
    lengths = np.full(batch, length, np.int32)
    for at in range(0, length, chunk):
        part = ids[:, at : at + chunk]
        tokens = np.pad(part, ((0, 0), (0, chunk - part.shape[1])))
        cache, scores = engine.score(params, tables, cache, tokens, at, lengths)
        yield scores[:, : part.shape[1]]
    if on_sparsity and (found := measure(cache, engine.config, lengths)):
        on_sparsity(found)


def prompt_nll(
    engine: Engine,
    params: dict,
    token_ids: Any,
    chunk_size: int | None,
    on_sparsity: OnSparsity | None = None,
) -> np.ndarray:
    """Computes the negative log-likelihood of every next token; see LanguageModel.token_nll."""
    ids = as_rows(token_ids)
    parts = prompt_logits(engine, params, ids, chunk_size, on_sparsity)
    return _token_nll(parts, ids[:, 1:])


def decoded_nll(
    engine: Engine,
    params: dict,
    token_ids: Any,
    prompt_length: int,
    on_sparsity: OnSparsity | None = None,
) -> np.ndarray:
    """Computes losses of decoded tokens; see LanguageModel.teacher_forced_nll.

    Raises:
      UserError: the model has no embedding for an id, or fewer than two tokens are left to decode.
    """
    ids = _checked_rows(engine.config, token_ids)
    length = ids.shape[1]
    if not 0 < prompt_length < length - 1:
        raise UserError(
            f"prompt_length must be from 1 to {length - 2} for {length} tokens, of which two "
            f"at least are decoded, not {prompt_length}."
        )
    request = Request(
        prompts=tuple(tuple(row.tolist()) for row in ids),
        num_real=len(ids),
        max_output_length=length - prompt_length,
        prompt_capacity=prompt_length,
        sampling=Sampling(),
        eos_token_ids=frozenset(),
    )
    scores = teacher_forced_scores(engine, params, request, on_sparsity)
    return _token_nll(scores, ids[:, prompt_length + 1 :])


def _checked_rows(config: ModelConfig, token_ids: Any) -> np.ndarray:
    """Converts ids to [batch, length] int32, and checks that they are in the vocabulary."""
    ids = as_rows(token_ids)
    for row in ids:
        check_ids(config, row)
    return ids.astype(np.int32)


def _token_nll(parts: Iterator[jax.Array], targets: np.ndarray) -> np.ndarray:
    """Computes the negative log-likelihood of target ids.

    Args:
      parts: logits of consecutive chunks, [batch, chunk, vocab] float32 each.
      targets: [batch, length] ids that the logits are to predict.

    Returns:
      [batch, length] float32.
    """
    found, at = [], 0
    for scores in parts:
        these = targets[:, at : at + scores.shape[1]]
        found.append(to_host(_negative_log_likelihood(scores[:, : these.shape[1]], these)))
        at += scores.shape[1]
    return np.concatenate(found, axis=1)


@jax.jit
def _negative_log_likelihood(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """[batch, length, vocab] logits and [batch, length] ids -> [batch, length] losses."""
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(scores, axis=-1) - chosen
