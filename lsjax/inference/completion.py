"""Results of a generation: completions and the statistics of their batch."""

import dataclasses
from typing import Literal

from lsjax.inference.sparsity import Sparsity
from lsjax.runtime.html import table
from lsjax.runtime.memory import human_bytes


@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of the batch that a completion belongs to.

    Prefill and decode times exclude compilation. The time to first token includes it, because
    the caller waits for it.

    Attributes:
      prompt_tokens: tokens of all prompts of the batch.
      generated_tokens: tokens of all answers of the batch.
      time_to_first_token_seconds: time from the start of prefill to the first tokens, including
        compilation.
      prefill_seconds, prefill_tokens_per_second: time until every row has its first token, and
        the prompt tokens of all rows divided by it, without those of a document that was read
        before.
      decode_seconds, decode_tokens_per_second: time after the first token, and the rate of a
        single row.
      decode_steps: number of decode steps in that time.
      compile_seconds: time spent tracing and compiling, or reading compiled programs from disk.
      compilations: number of programs compiled; programs read from disk do not count.
      cache_bytes: size of the KV cache over all devices, with replicas counted once.
      peak_memory_bytes: peak memory so far, of the fullest device on an accelerator and of the
        process on a CPU.
      sparsity: what prompts have attended to; None if to everything.
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
    sparsity: Sparsity | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
      text: answer without special tokens, cut before a stop string; "" if the model has no
        tokenizer.
      token_ids: ids of the answer, including the end-of-sequence id if there was one.
      finish_reason: "stop" after an end-of-sequence id or a stop string, "length" after the
        requested number of tokens.
      prompt_tokens: number of tokens in the prompt.
      stats: statistics of the batch that the answer was part of.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    stats: Stats

    def _repr_html_(self) -> str:
        """Shows the answer and its statistics in a notebook."""
        s = self.stats
        return table(
            {
                "answer": self.text or self.token_ids,
                "tokens": f"{self.prompt_tokens:,} of prompt, {len(self.token_ids):,} generated "
                f"({self.finish_reason})",
                "first token": f"{s.time_to_first_token_seconds:.2f} s, compilation included",
                "prefill": f"{s.prefill_tokens_per_second:,.1f} tokens/s",
                "decode": f"{s.decode_tokens_per_second:,.1f} tokens/s",
                "KV cache": human_bytes(s.cache_bytes),
                "peak memory": human_bytes(s.peak_memory_bytes),
            }
        )
