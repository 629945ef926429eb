"""Requests: checked prompts, grouped into batches that share compiled programs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lsjax.cache import CacheSpec
from lsjax.compression import Compression, served_length
from lsjax.config import MAX_POSITIONS, ModelConfig
from lsjax.distributed.sequence_layout import CAPACITY_MULTIPLE
from lsjax.inference.engine_config import EngineConfig, check_chunks, round_up
from lsjax.inference.options import Options
from lsjax.inference.prompt_lookup import MAX_DRAFT_TOKENS
from lsjax.inference.sampling import Sampling
from lsjax.runtime.errors import UserError

# Sizes that a prompt's last chunk may have beside the usual one.
_LAST_CHUNKS = (16, 64, 256, 1024)


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of prompts to be answered together.

    Attributes:
      prompts: token ids of each row.
      num_real: number of rows that are real prompts; they come first, and the rest is padding.
      max_output_length: maximum number of tokens to generate per row.
      prompt_capacity: prompt tokens that the cache has room for; at least the longest prompt.
      sampling: how tokens are drawn.
      eos_token_ids: ids that end a row; may be empty.
      prompt_lookup_num_tokens: tokens drafted per decode step; 0 for no drafts.
      first: index of the batch's first prompt among all prompts of the call.
      num_samples: answers per prompt, in consecutive rows.
      stop: texts that end an answer.
      shared: number of leading tokens that every prompt shares with a document, which are not run.
      cached: number of those that the rows' own caches do not hold, see DocumentCache.
      starts_anywhere: whether the first chunk may start at any token, not at a fixed one.
      settled_length: length that the document's rotary scaling was chosen for; None if that does
        not depend on the length, or without a document.
    """

    prompts: tuple[tuple[int, ...], ...]
    num_real: int
    max_output_length: int
    prompt_capacity: int
    sampling: Sampling
    eos_token_ids: frozenset[int]
    prompt_lookup_num_tokens: int = 0
    first: int = 0
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    shared: int = 0
    cached: int = 0
    starts_anywhere: bool = False
    settled_length: int | None = None

    @property
    def numbers(self) -> list[tuple[int, int]]:
        """The (prompt index, sample index) of each row of answers."""
        prompts = range(self.first, self.first + len(self.prompts))
        return [(prompt, sample) for prompt in prompts for sample in range(self.num_samples)]

    def for_samples(self, of_prompts: Sequence[Any]) -> list[Any]:
        """Repeats an item per prompt so that there is one per row of answers."""
        return [x for x in of_prompts for _ in range(self.num_samples)]

    @property
    def lengths(self) -> list[int]:
        """Length that each row's rotary scaling is for: prompt and requested output, in tokens."""
        return [self.settled_length or len(p) + self.max_output_length for p in self.prompts]

    @property
    def ends(self) -> list[int]:
        """Position of the last token to generate in each row; padding rows get only a first."""
        more = [self.max_output_length - 1] * self.num_real
        more += [0] * (len(self.prompts) - self.num_real)
        return [len(p) + n for p, n in zip(self.prompts, more, strict=True)]

    @property
    def output_capacity(self) -> int:
        """Answer tokens that the cache has room for; the last draft may reach past the answer."""
        return self.max_output_length + self.prompt_lookup_num_tokens

    def cache_spec(self, settings: EngineConfig) -> CacheSpec:
        """Returns the spec of the cache that the batch needs beside a document's."""
        own, anywhere = self.prompt_capacity - self.cached, self.starts_anywhere
        anywhere = anywhere or self.shared > self.cached
        return settings.cache_spec(len(self.prompts), own, self.output_capacity, anywhere)

    def whole_cache_spec(self, settings: EngineConfig) -> CacheSpec:
        """Returns the spec of the cache that the batch would need if nothing was shared."""
        return settings.cache_spec(len(self.prompts), self.prompt_capacity, self.output_capacity)


def batches(
    options: Options,
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

    The arguments are those of LanguageModel.generate. Batches are padded with rows, so that all
    have one size, a multiple of the data axis, and no other shape is compiled.

    Raises:
      UserError: a prompt or an argument cannot be served.
    """
    for prompt in ids:
        check_ids(options.config, prompt)
    check_lengths(options, ids, max_output_length, max_input_length, allow_untrained_length)
    if max_batch_size is not None and max_batch_size < 1:
        raise UserError(f"max_batch_size must be at least 1, not {max_batch_size}.")
    if isinstance(sampling, str):
        if sampling != "auto":
            raise UserError(f"sampling must be a Sampling, or auto, not {sampling!r}.")
        sampling = options.suggested
    check_lookup(prompt_lookup_num_tokens, sampling)
    check_samples(num_samples, sampling, prompt_lookup_num_tokens)
    if isinstance(stop, str):
        stop = (stop,)
    if not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"stop must be texts of at least one character, not {list(stop)}.")
    if prompt_lookup_num_tokens and options.compression and not options.compression.keeps_drafts:
        raise UserError(
            "prompt lookup does not go with this kv_compression: a refused draft would have driven "
            "tokens out of the windows; set prompt_lookup_num_tokens 0, or kv_compression none."
        )
    rows = min(max_batch_size or len(ids), len(ids))
    data = options.mesh.shape["data"]
    rows = -(-rows // data) * data
    groups = [ids[i : i + rows] for i in range(0, len(ids), rows)]
    room = max_input_length or bucket(max(len(p) for p in ids))
    return [
        Request(
            prompts=(*group, *((0,) for _ in range(rows - len(group)))),
            num_real=len(group),
            max_output_length=max_output_length,
            prompt_capacity=room,
            sampling=sampling,
            eos_token_ids=frozenset() if ignore_eos else options.eos_token_ids,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            first=i * rows,
            num_samples=num_samples,
            stop=tuple(stop),
        )
        for i, group in enumerate(groups)
    ]


def check_ids(config: ModelConfig, ids: Sequence[int]) -> None:
    """Refuses ids that the model has no embedding for.

    Raises:
      UserError: an id is outside the vocabulary; the message names the first.
    """
    outside = [i for i in ids if not 0 <= i < config.vocab_size]
    if outside:
        raise UserError(
            f"token id {outside[0]} is outside the model's vocabulary of {config.vocab_size}."
        )


def check_lengths(
    options: Options,
    prompts: Sequence[Sequence[int]],
    max_output_length: int,
    max_input_length: int | None,
    allow_untrained_length: bool,
) -> None:
    """Refuses prompts and lengths that cannot be served, before anything is run.

    Raises:
      UserError: a prompt is empty, or a length is out of range; the message says what to change.
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
    check_chunks(options.config, options, total)
    if total > MAX_POSITIONS:
        raise UserError(
            f"prompt and output come to {total} tokens, but positions end at {MAX_POSITIONS}."
        )
    if not allow_untrained_length:
        check_total(options.config, total, total - max_output_length, options.compression)


def check_total(
    config: ModelConfig, total: int, prompt: int = 0, compression: Compression | None = None
) -> None:
    """Refuses more tokens, prompt and output together, than the model serves.

    Args:
      config: model configuration.
      total: number of tokens in prompt and output together.
      prompt: number of tokens in the longest prompt.
      compression: what layers keep of their cache; None for all that their queries see.

    Raises:
      UserError: `total` is too large; the message gives a rope_scaling that would serve it, and
        the output length that there is room for.
    """
    if total > served_length(config, compression):
        room = config.served_length - prompt
        less = f"ask for at most {room} tokens of output, " if prompt and room > 0 else ""
        raise UserError(
            f"prompt and output come to {total} tokens, but {way_out(config, total, less)}"
        )


def way_out(config: ModelConfig, total: int, less: str = "") -> str:
    """Says how many tokens the model serves, and which settings serve `total` tokens.

    `less` is advice to put before those settings.
    """
    kind, factor = config.rope_scaling.kind, total / config.trained_length
    served = f"the model serves {config.served_length} (rope scaling: {kind}); {less}"
    if kind == "dual_chunk":  # reads on as it does up to there
        return f"{served}insist with allow_untrained_length."
    block = (
        f'{{"rope_type": "yarn", "factor": {_tidy(factor)}, '
        f'"original_max_position_embeddings": {config.trained_length}}}'
    )
    return (
        f"{served}set rope_scaling, for example '{block}', or insist with allow_untrained_length."
    )


def check_lookup(num_tokens: int, sampling: Sampling) -> None:
    """Refuses drafts that cannot be verified.

    Raises:
      UserError: too many tokens are drafted, or the sampling is not plain greedy decoding.
    """
    if not 0 <= num_tokens <= MAX_DRAFT_TOKENS:
        raise UserError(
            f"prompt_lookup_num_tokens must be from 0 (no drafts) to {MAX_DRAFT_TOKENS}, not "
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
    """Returns the largest number of cache rows that a prompt takes at once.

    With several samples, the prompt's own row is alive until it has been copied for all of them.
    """
    return num_samples + (num_samples > 1)


def check_samples(num_samples: int, sampling: Sampling, prompt_lookup_num_tokens: int) -> None:
    """Refuses several samples of a prompt if all would be the same.

    Raises:
      UserError: num_samples is below 1, or above 1 with greedy decoding or prompt lookup.
    """
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, not {num_samples}.")
    if num_samples > 1 and (sampling.greedy or prompt_lookup_num_tokens):
        raise UserError(
            f"{num_samples} samples of a prompt would be the same without a temperature; set "
            "temperature, as in 1.0, or num_samples 1."
        )


def _tidy(factor: float) -> float:
    """Rounds a scaling factor up to a multiple of one half."""
    return -(-factor // 0.5) * 0.5


def chunks(
    length: int, chunk: int, block_length: int, least: int = 64
) -> Iterator[tuple[int, int]]:
    """Yields the start and the size of each prefill chunk of a prompt.

    The last one has the smallest of a few sizes that holds the rest, so that a short prompt runs
    few padding tokens and the number of compiled programs stays bounded.

    Args:
      length: prompt length in tokens, or that of what is left of it.
      chunk: size of all chunks but the last.
      block_length: zigzag block length, which divides every size; 0 on one device.
      least: smallest size of the last chunk, if the usual one is larger.
    """
    if not length:
        return
    start = (length - 1) // chunk * chunk
    for whole in range(0, start, chunk):
        yield whole, chunk
    sizes = [n for n in _LAST_CHUNKS if least <= n < chunk and n % (block_length or 1) == 0]
    yield start, next((size for size in sizes if start + size >= length), chunk)


def bucket(length: int) -> int:
    """Rounds a length up, so that prompts of similar lengths share compiled programs.

    A length of at least 8 * CAPACITY_MULTIPLE grows by less than an eighth; a smaller one is
    rounded up to a multiple of CAPACITY_MULTIPLE.
    """
    return round_up(length, max(CAPACITY_MULTIPLE, 1 << max(length.bit_length() - 4, 0)))
