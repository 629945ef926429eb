"""A loaded model: text in, text out."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsjax.cache import stripe_of, whole_stripes
from lsjax.checkpoint import load_parameters, save_parameters
from lsjax.compression import Razor
from lsjax.compression.arrange import arranged
from lsjax.engine import Engine
from lsjax.errors import UserError
from lsjax.generation import forced_scores
from lsjax.hosts import to_host
from lsjax.inputs import Prompt, as_prompts, as_rows
from lsjax.positions.scaling import override_rope_scaling
from lsjax.requests import Request, batches, cache_spec, check_ids
from lsjax.results import Completion
from lsjax.run import Run
from lsjax.sampling import Sampling
from lsjax.settings import Settings, settle
from lsjax.stop_strings import TextStream
from lsjax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    mesh: str | Mapping[str, int] | Mesh = "",
    rope_scaling: str | Mapping[str, Any] | None = None,
    prefill_chunk: int | None = None,
    kv_compression: str | Mapping[str, Any] | Razor | None = None,
    progress: Callable[[int], None] | None = None,
) -> "LanguageModel":
    """Loads a model onto the devices.

    Args:
      path: a Hugging Face folder, or one that hf_to_orbax.py has written; None for the small
        model that comes with the package.
      dtype: of weights and activations: float32, bfloat16, or auto (float32 on CPU, else what
        the checkpoint was published in).
      kv_cache_dtype: float32, bfloat16, int8, or auto (as dtype).
      mesh: which devices do what: "context=4,model=2", {"context": 4, "model": 2}, or a Mesh
        with the axes data, context and model. Nothing for one device.
      rope_scaling: as in config.json, an object or its JSON; "off" for none; "auto" for what
        each request's length needs; None for what config.json says.
      prefill_chunk: tokens of prompt run at once; None for 512 on CPU and 4096 elsewhere.
      kv_compression: "razor" lets most heads keep the last tokens only, see Razor for what can be
        set, as a mapping or its JSON. "none" or None: every head keeps everything.
      progress: called with the number of bytes read, again and again.

    Raises:
      UserError: the folder, or what was asked for, is wrong; says how.
    """
    settings = settle(
        path,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        mesh=mesh,
        rope_scaling=rope_scaling,
        prefill_chunk=prefill_chunk,
        kv_compression=kv_compression,
    )
    return load_settled(settings, progress)


def load_settled(
    settings: Settings, progress: Callable[[int], None] | None = None
) -> "LanguageModel":
    """`load`, for settings that are settled already."""
    s = settings
    params = load_parameters(s.folder, s.config, s.mesh, s.dtype, progress)
    if s.compression:
        params = arranged(params, s.config, s.compression)
    return LanguageModel(s, params)


class LanguageModel:
    """A model that answers.

    Attributes:
      settings: how it is run.
      config: what it is.
      params: its parameters, a nested dict of arrays on the mesh; with kv_compression its heads
        stand in another order than in the folder.
      engine: its compiled programs.
    """

    def __init__(self, settings: Settings, params: dict):
        self.settings, self.config, self.params = settings, settings.config, params
        s = settings
        self.engine = Engine(
            s.config, s.mesh, s.dtype, s.kv_cache_dtype, s.prefill_chunk, s.compression, s.segment
        )
        self._scoring: dict[int, Engine] = {}

    def with_rope_scaling(self, rope_scaling: str | Mapping[str, Any]) -> "LanguageModel":
        """The same weights, served with another rope_scaling; see `load`."""
        config = override_rope_scaling(self.config, rope_scaling)
        return LanguageModel(dataclasses.replace(self.settings, config=config), self.params)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model to a new folder, which `load` reads onto any mesh.

        Raises:
          UserError: the folder is taken, its disk is too small, or heads are out of order.
        """
        if self.settings.compression:
            raise UserError(
                "a model loaded with kv_compression has its heads in another order; load it "
                "without to save it."
            )
        save_parameters(self.params, self.settings.folder, folder)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer.

        Raises:
          UserError: there is none.
        """
        return self.settings.tokenizer or load_tokenizer(self.settings.folder)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """A text, or ids as they are, as ids."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return tuple(int(i) for i in ids)

    def logits(self, token_ids: Any, chunk_size: int | None = None) -> np.ndarray:
        """Scores of every next token.

        Args:
          token_ids: [batch, length] or [length] ids.
          chunk_size: tokens run at once; None for prefill_chunk.

        Returns:
          [batch, length, vocab_size] float32, on the host.
        """
        return np.concatenate([to_host(x) for x in self._scores(token_ids, chunk_size)], axis=1)

    def losses(self, token_ids: Any, chunk_size: int | None = None) -> np.ndarray:
        """How unforeseen every next token is.

        Args:
          token_ids: [batch, length] or [length] ids.
          chunk_size: tokens run at once; None for prefill_chunk.

        Returns:
          [batch, length - 1] float32: minus the log-probability of token i + 1 after token i.
        """
        ids = as_rows(token_ids)
        return _losses(self._scores(ids, chunk_size), ids[:, 1:])

    def decode_losses(self, token_ids: Any, prompt_length: int) -> np.ndarray:
        """How unforeseen tokens are that are decoded one by one, over the cache as it is then.

        What a compressed cache costs shows here.

        Args:
          token_ids: [batch, length] or [length] ids.
          prompt_length: how many of them are the prompt.

        Returns:
          [batch, length - prompt_length - 1] float32: minus the log-probability of each token but
          the first after the prompt.

        Raises:
          UserError: an id that the model has no embedding for, or nothing left to decode.
        """
        ids = self._rows(token_ids)
        length = ids.shape[1]
        if not 0 < prompt_length < length - 1:
            raise UserError(
                f"prompt_length must be from 1 to {length - 2} for {length} tokens, of which two "
                f"at least are decoded, not {prompt_length}."
            )
        request = Request(
            prompts=tuple(tuple(row.tolist()) for row in ids),
            count=len(ids),
            max_output_length=length - prompt_length,
            input_room=prompt_length,
            chunk=self.settings.prefill_chunk,
            sampling=Sampling(),
            eos_token_ids=frozenset(),
            segment=self.settings.segment,
            cache_block=self.settings.cache_block,
        )
        scores = forced_scores(self.engine, self.params, request)
        return _losses(scores, ids[:, prompt_length + 1 :])

    def _rows(self, token_ids: Any) -> np.ndarray:
        """[batch, length] ids that the model has embeddings for."""
        ids = as_rows(token_ids)
        for row in ids:
            check_ids(self.config, row)
        return ids.astype(np.int32)

    def _scores(self, token_ids: Any, chunk_size: int | None) -> Iterator[jax.Array]:
        """Logits of each chunk in turn, [batch, up to chunk, vocab_size] float32."""
        if self.settings.compression:
            raise UserError(
                "scores of a prompt's own tokens do not show what a compressed cache costs. Score "
                "what is decoded after a prompt (decode_losses, --prompt_length), or leave out "
                "kv_compression."
            )
        ids = self._rows(token_ids)
        batch, length = ids.shape
        s, context = self.settings, self.settings.mesh.shape["context"]
        chunk = whole_stripes(min(chunk_size or s.prefill_chunk, length), context)
        engine = self._scoring_engine(chunk)
        spec = cache_spec(
            s.mesh, batch, length, 0, chunk, s.kv_cache_dtype, s.dtype, s.segment, s.cache_block
        )
        cache = engine.new_cache(spec, length)
        tables = engine.tables([length] * batch)
        for at in range(0, length, chunk):
            part = ids[:, at : at + chunk]
            tokens = np.pad(part, ((0, 0), (0, chunk - part.shape[1])))
            cache, scores = engine.score(self.params, tables, cache, tokens, at)
            yield scores[:, : part.shape[1]]

    def _scoring_engine(self, chunk: int) -> Engine:
        """One for chunks of this size, which on a context axis decide where positions lie."""
        s = self.settings
        if stripe_of(chunk, s.mesh.shape["context"]) == self.engine.stripe:
            return self.engine
        if chunk not in self._scoring:
            self._scoring[chunk] = Engine(s.config, s.mesh, s.dtype, s.kv_cache_dtype, chunk)
        return self._scoring[chunk]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_output_length: int = 256,
        *,
        max_input_length: int | None = None,
        max_batch_size: int | None = None,
        sampling: Sampling | Literal["auto"] = Sampling(),  # noqa: B008 (frozen)
        ignore_eos: bool = False,
        allow_untrained_length: bool = False,
        prompt_lookup_num_tokens: int = 0,
        num_samples: int = 1,
        stop: str | Sequence[str] = (),
        on_prefill: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Answers prompts.

        Args:
          prompts: a text or a list of ids, or a list of such.
          max_output_length: tokens to generate at most for each.
          max_input_length: make room for prompts of this many tokens, and refuse longer ones, so
            that prompts of any length up to it share compiled programs. None: as long as the
            longest prompt.
          max_batch_size: answer at most this many together; None for all.
          sampling: greedy unless said otherwise; "auto" as generation_config.json suggests.
          ignore_eos: do not end at an end-of-sequence token.
          allow_untrained_length: run past the length that the model is meant for.
          prompt_lookup_num_tokens: draft this many tokens for each step of decoding from where the
            last ones stood before, and verify them at once: greedy tokens stay what they were,
            and come faster where the text repeats itself. At most 15; 0 for none.
          num_samples: answers to each prompt, which is read once for all of them.
          stop: a text, or several: an answer ends before the first of them.
          on_prefill: called with the number of positions run, after each chunk.

        Returns:
          A completion for each sample of each prompt, in order.

        Raises:
          UserError: a prompt is empty or too long, or a number is out of range.
        """
        ids = [self.encode(prompt) for prompt in as_prompts(prompts)]
        done: list[Completion] = []
        for request in batches(
            self.settings,
            ids,
            max_output_length,
            max_input_length=max_input_length,
            max_batch_size=max_batch_size,
            sampling=sampling,
            ignore_eos=ignore_eos,
            allow_untrained_length=allow_untrained_length,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            num_samples=num_samples,
            stop=stop,
        ):
            run = self.start(request, on_prefill)
            for _ in run:
                pass
            done += run.completions()
        return done

    def stream(self, prompt: Prompt, max_output_length: int = 256, **options: Any) -> Iterator[str]:
        """Answers one prompt, yielding text as it comes; options are those of `generate`.

        The pieces joined are the text that `generate` returns.
        """
        on_prefill = options.pop("on_prefill", None)
        if options.get("num_samples", 1) != 1:
            raise UserError("stream yields one answer; leave out num_samples, or use generate.")
        prompts = as_prompts(prompt)
        if len(prompts) != 1:
            raise UserError("stream answers one prompt; use generate for several.")
        ids = self.encode(prompts[0])
        (request,) = batches(self.settings, [ids], max_output_length, **options)
        text = TextStream(self.tokenizer, request.stop)
        for new in self.start(request, on_prefill):
            if piece := text.push(new[0]):
                yield piece
        if piece := text.flush():
            yield piece

    def start(self, request: Request, on_prefill: Callable[[int], None] | None = None) -> Run:
        """A batch to iterate over, see Run; for programs that show it as it comes."""
        tokenizer = self.tokenizer if has_tokenizer(self.settings.folder) else None
        return Run(self.engine, self.params, tokenizer, request, on_prefill)


def _losses(parts: Iterator[jax.Array], targets: np.ndarray) -> np.ndarray:
    """Scores of consecutive stretches, and the [batch, length] ids that came -> their losses."""
    found, at = [], 0
    for scores in parts:
        these = targets[:, at : at + scores.shape[1]]
        found.append(to_host(_nats(scores[:, : these.shape[1]], these)))
        at += scores.shape[1]
    return np.concatenate(found, axis=1)


@jax.jit
def _nats(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """[batch, length, vocab] logits, [batch, length] ids -> [batch, length] losses."""
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(scores, axis=-1) - chosen
