"""What a generation returns."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Stats:
    """Figures of the batch that a completion was made in.

    Seconds are without compiling, except time_to_first_token_seconds, which is what was waited.

    Attributes:
      prompt_tokens: over all rows.
      generated_tokens: over all rows.
      time_to_first_token_seconds: from the start of prefill, compiling included.
      prefill_seconds, prefill_tokens_per_second: until the first token of every row.
      decode_seconds, decode_tokens_per_second: after it; the rate is that of one row.
      decode_steps: times that the model was run for these.
      compile_seconds: tracing and compiling, or reading compiled programs from disk.
      compilations: programs compiled, those read from disk not counted.
      cache_bytes: the KV cache, over all devices.
      peak_memory_bytes: the most that the process (on an accelerator: the fullest device) has
        held so far.
    """

    prompt_tokens: int
    generated_tokens: int
    time_to_first_token_seconds: float
    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_seconds: float
    decode_tokens_per_second: float
    decode_steps: int
    compile_seconds: float
    compilations: int
    cache_bytes: int
    peak_memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
      text: the answer, without special tokens and up to a stop string; "" where the
        model has no tokenizer.
      token_ids: its ids, with the end-of-sequence id where there was one.
      finish_reason: "stop" at an end-of-sequence or a stop string, "length" at the asked length.
      prompt_tokens: of its prompt.
      stats: of the batch it was part of.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    stats: Stats
