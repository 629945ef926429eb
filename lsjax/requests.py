"""Prompts that have been checked, grouped into batches that share compiled programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jax.sharding import Mesh

from lsjax.cache import BLOCK, GRANULE, CacheSpec, stripe_of
from lsjax.config import MAX_POSITIONS, ModelConfig
from lsjax.engine import SEGMENT
from lsjax.errors import UserError
from lsjax.lookup import MOST_DRAFTED
from lsjax.sampling import Sampling
from lsjax.settings import Settings

# A long cache's capacity is a multiple of this (for each device along the context axis), so that
# attention can read it in large blocks.
_LARGE_GRANULE = 16 * GRANULE


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of prompts to be answered together.

    Attributes:
      prompts: token ids of each row.
      count: how many rows, the first ones, are somebody's; the rest fill the batch up.
      max_output_length: tokens to generate at most, for each row.
      input_room: tokens of prompt that the cache makes room for; at least the longest prompt.
      chunk: tokens of prompt run at once.
      sampling: how tokens are drawn.
      eos_token_ids: any of these ends a row; empty for none.
      prompt_lookup_num_tokens: tokens drafted for each step of decoding; 0 for none.
      first: the number of the first prompt among all that were given.
      num_samples: answers to each prompt, in rows one after the other.
      stop: texts that end an answer.
      segment, cache_block: as of Settings.
    """

    prompts: tuple[tuple[int, ...], ...]
    count: int
    max_output_length: int
    input_room: int
    chunk: int
    sampling: Sampling
    eos_token_ids: frozenset[int]
    prompt_lookup_num_tokens: int = 0
    first: int = 0
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    segment: int = SEGMENT
    cache_block: int = BLOCK

    @property
    def numbers(self) -> list[tuple[int, int]]:
        """Of each row of answers: its prompt's number, and its own among that prompt's."""
        prompts = range(self.first, self.first + len(self.prompts))
        return [(prompt, sample) for prompt in prompts for sample in range(self.num_samples)]

    def for_samples(self, of_prompts: Sequence[Any]) -> list[Any]:
        """Something of each prompt -> the same of each row of answers."""
        return [x for x in of_prompts for _ in range(self.num_samples)]

    @property
    def lengths(self) -> list[int]:
        """Prompt and requested output of each row, in tokens."""
        return [len(p) + self.max_output_length for p in self.prompts]

    @property
    def output_room(self) -> int:
        """Tokens of answer that the cache makes room for: the last draft reaches past its end."""
        return self.max_output_length + self.prompt_lookup_num_tokens

    def cache_spec(self, mesh: Mesh, dtype: str, compute_dtype: str) -> CacheSpec:
        """The cache that the batch needs; see CacheSpec for the dtypes."""
        rows, room = len(self.prompts), (self.input_room, self.output_room)
        sizes = self.segment, self.cache_block
        return cache_spec(mesh, rows, *room, self.chunk, dtype, compute_dtype, *sizes)


def batches(
    settings: Settings,
    ids: Sequence[tuple[int, ...]],
    max_output_length: int,
    *,
    max_input_length: int | None = None,
    max_batch_size: int | None = None,
    sampling: Sampling | Literal["auto"] = Sampling(),  # noqa: B008 (frozen)
    ignore_eos: bool = False,
    allow_untrained_length: bool = False,
    prompt_lookup_num_tokens: int = 0,
    num_samples: int = 1,
    stop: Sequence[str] = (),
) -> list[Request]:
    """Checks prompts and groups them into batches of one shape.

    The arguments are those of LanguageModel.generate. The last batch, and on a mesh with a data
    axis every batch, is filled up so that no other shape is compiled.

    Raises:
      UserError: a prompt or a number that cannot be served.
    """
    for prompt in ids:
        check_ids(settings.config, prompt)
    check_lengths(settings.config, ids, max_output_length, max_input_length, allow_untrained_length)
    if max_batch_size is not None and max_batch_size < 1:
        raise UserError(f"max_batch_size must be at least 1, not {max_batch_size}.")
    if isinstance(sampling, str):
        if sampling != "auto":
            raise UserError(f"sampling must be a Sampling, or auto, not {sampling!r}.")
        sampling = settings.suggested
    check_lookup(prompt_lookup_num_tokens, sampling)
    check_samples(num_samples, sampling, prompt_lookup_num_tokens)
    if isinstance(stop, str):
        stop = (stop,)
    if not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"stop must be texts of at least one character, not {list(stop)}.")
    if prompt_lookup_num_tokens and settings.compression:
        raise UserError(
            "prompt lookup does not go with kv_compression: a draft that is refused would have "
            "driven tokens out of the windows; set prompt_lookup_num_tokens 0, or kv_compression "
            "none."
        )
    rows = min(max_batch_size or len(ids), len(ids))
    data = settings.mesh.shape["data"]
    rows = -(-rows // data) * data
    groups = [ids[i : i + rows] for i in range(0, len(ids), rows)]
    room = max_input_length or bucket(max(len(p) for p in ids))
    return [
        Request(
            prompts=(*group, *((0,) for _ in range(rows - len(group)))),
            count=len(group),
            max_output_length=max_output_length,
            input_room=room,
            chunk=settings.prefill_chunk,
            sampling=sampling,
            eos_token_ids=frozenset() if ignore_eos else settings.eos_token_ids,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            first=i * rows,
            num_samples=num_samples,
            stop=tuple(stop),
            segment=settings.segment,
            cache_block=settings.cache_block,
        )
        for i, group in enumerate(groups)
    ]


def check_ids(config: ModelConfig, ids: Sequence[int]) -> None:
    """Refuses ids that the model has no embedding for.

    Raises:
      UserError: naming the first.
    """
    outside = [i for i in ids if not 0 <= i < config.vocab_size]
    if outside:
        raise UserError(
            f"token id {outside[0]} is outside the model's vocabulary of {config.vocab_size}."
        )


def check_lengths(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_output_length: int,
    max_input_length: int | None,
    allow_untrained_length: bool,
) -> None:
    """Refuses prompts and lengths that cannot be served, before anything is run.

    Raises:
      UserError: saying both numbers and the way out.
    """
    if max_output_length < 1:
        raise UserError(f"max_output_length must be at least 1 token, not {max_output_length}.")
    if max_input_length is not None and max_input_length < 1:
        raise UserError(f"max_input_length must be at least 1 token, not {max_input_length}.")
    if not prompts:
        raise UserError("there is no prompt; give at least one text or list of token ids.")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty; give at least one token.")
        if max_input_length is not None and len(prompt) > max_input_length:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, but max_input_length is {max_input_length}; "
                f"nothing is cut off silently, so raise max_input_length to {len(prompt)} or "
                "shorten the prompt."
            )
    total = max(len(p) for p in prompts) + max_output_length
    check_exact_length(config, total)
    if not allow_untrained_length:
        check_total(config, total, total - max_output_length)
    if total > MAX_POSITIONS:
        raise UserError(
            f"prompt and output come to {total} tokens, but positions end at {MAX_POSITIONS}."
        )


def check_exact_length(config: ModelConfig, total: int) -> None:
    """Refuses more tokens than attention is computed for as the model wants it.

    Raises:
      UserError: saying how many that are.
    """
    if config.exact_length is not None and total > config.exact_length:
        raise UserError(
            f"{total} tokens are asked for, but past {config.exact_length} the model has dual "
            "chunk attention (config.json's dual_chunk_attention_config), which is not supported; "
            f"ask for at most {config.exact_length}, prompt and output together."
        )


def check_total(config: ModelConfig, total: int, prompt: int = 0) -> None:
    """Refuses more tokens, prompt and output together, than the model is meant for.

    Args:
      config: the model.
      total: tokens.
      prompt: how many of them are the longest prompt.

    Raises:
      UserError: with the rope_scaling that would serve them, and the output that there is room for.
    """
    if total > config.served_length:
        room = config.served_length - prompt
        less = f"ask for at most {room} tokens of output, " if prompt and room > 0 else ""
        raise UserError(
            f"prompt and output come to {total} tokens, but {way_out(config, total, less)}"
        )


def way_out(config: ModelConfig, total: int, less: str = "") -> str:
    """What the model serves, and what to set that it serves `total` tokens; `less` comes first."""
    factor = total / config.trained_length
    return (
        f"the model serves {config.served_length} (rope scaling: {config.rope_scaling.kind}); "
        f'{less}set rope_scaling, for example \'{{"rope_type": "yarn", "factor": {_tidy(factor)}, '
        f'"original_max_position_embeddings": {config.trained_length}}}\', or insist with '
        "allow_untrained_length."
    )


def check_lookup(num_tokens: int, sampling: Sampling) -> None:
    """Refuses a draft that cannot be verified.

    Raises:
      UserError: saying what can be.
    """
    if not 0 <= num_tokens <= MOST_DRAFTED:
        raise UserError(
            f"prompt_lookup_num_tokens must be from 0 (no drafts) to {MOST_DRAFTED}, not "
            f"{num_tokens}."
        )
    if num_tokens and not sampling.greedy:
        raise UserError(
            "prompt lookup verifies drafts against the likeliest token, so it does not go with "
            f"temperature {sampling.temperature}; set temperature 0, or prompt_lookup_num_tokens 0."
        )
    if num_tokens and sampling.penalized:
        raise UserError(
            "prompt lookup verifies drafts against the likeliest token, so it does not go with "
            "repetition_penalty; set repetition_penalty 1, or prompt_lookup_num_tokens 0."
        )


def caches_held(num_samples: int) -> int:
    """Rows of cache at the most for a prompt: with several samples its own is there until it is
    copied for all."""
    return num_samples + (num_samples > 1)


def check_samples(num_samples: int, sampling: Sampling, prompt_lookup_num_tokens: int) -> None:
    """Refuses several answers that would all be the same.

    Raises:
      UserError: saying what several answers take.
    """
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, not {num_samples}.")
    if num_samples > 1 and (sampling.greedy or prompt_lookup_num_tokens):
        raise UserError(
            f"{num_samples} samples of a prompt would be the same without a temperature; set "
            "temperature, as in 1.0, or num_samples 1."
        )


def _tidy(factor: float) -> float:
    """A scaling factor that covers `factor`: the next half."""
    return -(-factor // 0.5) * 0.5


def cache_spec(
    mesh: Mesh,
    batch: int,
    input_room: int,
    output: int,
    chunk: int,
    dtype: str,
    compute_dtype: str,
    segment: int = SEGMENT,
    block: int = BLOCK,
) -> CacheSpec:
    """The cache for rows of a prompt and an answer, filled in chunks; see CacheSpec."""
    context = mesh.shape["context"]
    capacity = cache_capacity(input_room, output, chunk, context, segment)
    return CacheSpec(batch, capacity, dtype, compute_dtype, stripe_of(chunk, context), block)


def cache_capacity(
    input_room: int, output: int, chunk: int, context: int, segment: int = SEGMENT
) -> int:
    """Room for the prompt's last, padded chunk and for the answer's last, whole segment."""
    needed = max(round_up(input_room, chunk), input_room + round_up(output, segment))
    granule = _LARGE_GRANULE if needed > 8 * _LARGE_GRANULE else GRANULE
    return round_up(needed, granule * context)


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def bucket(length: int) -> int:
    """A length rounded up by at most an eighth, so that prompts of like length share programs."""
    return round_up(length, max(GRANULE, 1 << max(length.bit_length() - 4, 0)))
