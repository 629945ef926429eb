"""The main interface: loading a model, generating text with it, and scoring tokens."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from lsjax.attention.sparse.rule import SparsePrefill
from lsjax.checkpoint import load_parameters, save_parameters
from lsjax.compression import CompressionSettings
from lsjax.distributed.multihost import to_host
from lsjax.documents import (
    Chat,
    Document,
    chat_frame,
    fingerprint,
    open_document,
    read_document,
    read_kept,
    requests_after,
    unread_document,
)
from lsjax.inference.completion import Completion
from lsjax.inference.engine import Engine
from lsjax.inference.generate import Run
from lsjax.inference.options import Options, changed, resolve_options
from lsjax.inference.prompts import Prompt, as_prompts
from lsjax.inference.request import Request, batches
from lsjax.inference.sampling import Sampling
from lsjax.inference.scoring import decoded_nll, prompt_logits, prompt_nll
from lsjax.inference.sparse_prefill import parse_sparse_prefill
from lsjax.inference.steps import DecodeState
from lsjax.inference.stop_strings import TextStream
from lsjax.positions.scaling import override_rope_scaling
from lsjax.runtime.errors import UserError
from lsjax.shipped import shipped_model_path
from lsjax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "auto",
    weight_dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    mesh: str | Mapping[str, int] | Mesh = "",
    rope_scaling: str | Mapping[str, Any] | None = None,
    prefill_chunk: int | None = None,
    kv_compression: str | Mapping[str, Any] | CompressionSettings | None = None,
    sparse_prefill: str | float | Mapping[str, Any] | SparsePrefill | None = None,
    progress: Callable[[int], None] | None = None,
) -> "LanguageModel":
    """Loads a model onto the devices.

    Args:
      path: Hugging Face folder, or a folder written by lsjax-convert; None for the small model
        that comes with the package.
      dtype: dtype of weights and activations: float32, bfloat16, or auto. auto is float32 on a
        CPU or for a float32 checkpoint, else bfloat16.
      weight_dtype: int8 for weight matrices in int8 with a scale per output channel, half of
        bfloat16's memory; auto for `dtype`, or for what a converted folder holds.
      kv_cache_dtype: dtype of the KV cache: float32, bfloat16, int8, int4, or auto (same as dtype).
      mesh: device mesh, such as "context=4,model=2", {"context": 4, "model": 2}, or a Mesh with
        the axes data, context and model; "" for one device.
      rope_scaling: RoPE scaling, an object as in config.json or its JSON; "off" for none; "auto"
        for what each request's length needs; None for what config.json says.
      prefill_chunk: prompt tokens per prefill step; None for 512 on CPU and 4096 elsewhere.
      kv_compression: "razor" for RazorAttention, with which most heads keep only the last tokens;
        "streaming_llm" for StreamingLLM, which forgets all but the first and the last tokens; or a
        mapping with such a "kind" and its settings, or its JSON. "none" or None turns it off.
      sparse_prefill: alpha, such as 0.05, with which prompts attend to the blocks of keys whose
        estimated weight is at least that share of the largest, and to the means of the others; or a
        mapping with "alpha" and other settings of SparsePrefill, or its JSON. "none" or None has
        prompts attend to everything, as decoding always does.
      progress: called repeatedly with the number of bytes read since its last call.

    Raises:
      UserError: the folder or an argument is wrong; the message says what.
    """
    options = resolve_options(
        shipped_model_path() if path is None else path,
        dtype=dtype,
        weight_dtype=weight_dtype,
        kv_cache_dtype=kv_cache_dtype,
        mesh=mesh,
        rope_scaling=rope_scaling,
        prefill_chunk=prefill_chunk,
        kv_compression=kv_compression,
        sparse_prefill=sparse_prefill,
    )
    return load_from_options(options, progress)


def load_from_options(
    options: Options, progress: Callable[[int], None] | None = None
) -> "LanguageModel":
    """Loads a model as `load` does, with options that are already resolved."""
    s = options
    params = load_parameters(s.folder, s.config, s.mesh, s.dtype, progress, s.weight_dtype)
    if s.compression:
        params = s.compression.reorder_heads(params, s.config)
    return LanguageModel(s, params)


class LanguageModel:
    """A loaded model, which generates text and scores tokens.

    Attributes:
      options: resolved options that the model runs with.
      config: model configuration.
      params: model parameters, a nested dict of arrays on the mesh. With kv_compression, their
        heads are in a different order than in the folder.
      engine: engine that compiles and runs the model's programs.
    """

    def __init__(self, options: Options, params: dict):
        self.options, self.config, self.params = options, options.config, params
        self.engine = Engine(options.config, options)

    def with_rope_scaling(self, rope_scaling: str | Mapping[str, Any]) -> "LanguageModel":
        """Returns a model with the same weights and another rope_scaling; see `load`."""
        config = override_rope_scaling(self.config, rope_scaling)
        return LanguageModel(changed(self.options, config=config), self.params)

    def with_sparse_prefill(self, given: float | SparsePrefill | None) -> "LanguageModel":
        """Returns a model with the same weights and another sparse_prefill; see `load`."""
        options = changed(self.options, sparse_prefill=parse_sparse_prefill(given))
        return LanguageModel(options, self.params)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model to a new folder, which `load` can read onto any mesh.

        Raises:
          UserError: the folder is not empty, its disk is too small, or the model was loaded with
            a kv_compression that reorders its heads.
        """
        if self.options.compression and self.options.compression.reorders_heads:
            raise UserError(
                "a model loaded with this kv_compression has its heads in another order; load it "
                "without to save it."
            )
        save_parameters(self.params, self.options.folder, folder)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model folder.

        Raises:
          UserError: the folder has no tokenizer.
        """
        return self.options.tokenizer or load_tokenizer(self.options.folder)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Converts a text to token ids; a prompt of ids is returned as it is."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return tuple(int(i) for i in ids)

    def logits(self, token_ids: Any, chunk_size: int | None = None) -> np.ndarray:
        """Computes the logits of every next token.

        Args:
          token_ids: [batch, length] or [length] ids.
          chunk_size: tokens per prefill step; None for prefill_chunk.

        Returns:
          [batch, length, vocab_size] float32, on the host.
        """
        parts = prompt_logits(self.engine, self.params, token_ids, chunk_size)
        return np.concatenate([to_host(x) for x in parts], axis=1)

    def token_nll(self, token_ids: Any, chunk_size: int | None = None) -> np.ndarray:
        """Computes the negative log-likelihood of every next token.

        Args:
          token_ids: [batch, length] or [length] ids.
          chunk_size: tokens per prefill step; None for prefill_chunk.

        Returns:
          [batch, length - 1] float32; entry i is that of token i + 1, given tokens 0 to i.
        """
        return prompt_nll(self.engine, self.params, token_ids, chunk_size)

    def teacher_forced_nll(self, token_ids: Any, prompt_length: int) -> np.ndarray:
        """Computes the negative log-likelihood of tokens that are decoded one by one.

        Decoding reads the cache as generation would, so this shows what a compressed cache costs.

        Args:
          token_ids: [batch, length] or [length] ids.
          prompt_length: number of leading tokens that are prefilled as the prompt.

        Returns:
          [batch, length - prompt_length - 1] float32 of the tokens after the prompt, without the
          first of them.

        Raises:
          UserError: the model has no embedding for an id, or fewer than two tokens are left to
            decode.
        """
        return decoded_nll(self.engine, self.params, token_ids, prompt_length)

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
        document: Document | None = None,
        on_prefill: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Answers prompts.

        Args:
          prompts: a text or a list of ids, or a list of several prompts.
          max_output_length: maximum number of tokens to generate per answer.
          max_input_length: prompt tokens that the cache has room for; longer prompts are refused.
            Prompts of any length up to it share compiled programs. None for the longest prompt.
          max_batch_size: maximum number of prompts answered together; None for all.
          sampling: sampling parameters, greedy by default; "auto" for what generation_config.json
            suggests.
          ignore_eos: whether to keep generating past end-of-sequence tokens.
          allow_untrained_length: whether to allow sequences longer than the model serves.
          prompt_lookup_num_tokens: tokens drafted per decode step from an earlier occurrence of
            the last tokens, and verified at once. Greedy output does not change, and comes faster
            where the text repeats itself. At most 15; 0 turns it off.
          num_samples: answers per prompt; each prompt is prefilled once.
          stop: one or several stop strings; an answer ends before the first of them.
          document: a document that `read` or `open_document` returned. Each prompt then goes on
            where the document ends, whose keys and values are kept once for all of them.
          on_prefill: called after each chunk with the number of positions run.

        Returns:
          A completion for each sample of each prompt, in order.

        Raises:
          UserError: a prompt is empty or too long, or an argument is out of range.
        """
        ids = [self.encode_after(document, prompt) for prompt in as_prompts(prompts)]
        done: list[Completion] = []
        for request in self.requests(
            ids,
            max_output_length,
            document,
            max_input_length=max_input_length,
            max_batch_size=max_batch_size,
            sampling=sampling,
            ignore_eos=ignore_eos,
            allow_untrained_length=allow_untrained_length,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            num_samples=num_samples,
            stop=stop,
        ):
            run = self.start(request, on_prefill, document)
            for _ in run:
                pass
            done += run.completions()
        return done

    def stream(self, prompt: Prompt, max_output_length: int = 256, **options: Any) -> Iterator[str]:
        """Yields the text that `generate` would return for one prompt, as it is generated.

        Args:
          prompt: a text or a list of ids.
          max_output_length: maximum number of tokens to generate.
          **options: further arguments of `generate`, except num_samples.

        Raises:
          UserError: there are several prompts or samples, or see `generate`.
        """
        on_prefill, document = (options.pop(n, None) for n in ("on_prefill", "document"))
        if options.get("num_samples", 1) != 1:
            raise UserError("stream yields one answer; leave out num_samples, or use generate.")
        prompts = as_prompts(prompt)
        if len(prompts) != 1:
            raise UserError("stream answers one prompt; use generate for several.")
        ids = self.encode_after(document, prompts[0])
        (request,) = self.requests([ids], max_output_length, document, **options)
        text = TextStream(self.tokenizer, request.stop)
        for new in self.start(request, on_prefill, document):
            if piece := text.push(new[0]):
                yield piece
        if piece := text.flush():
            yield piece

    def requests(
        self,
        ids: Sequence[tuple[int, ...]],
        max_output_length: int,
        document: Document | None = None,
        **options: Any,
    ) -> list[Request]:
        """Groups prompts, which include the document, into batches; see `request.batches`.

        Raises:
          UserError: the document belongs to another model, or see `batches`.
        """
        if document is None:
            return batches(self.options, ids, max_output_length, **options)
        return requests_after(
            document, self.options, self.fingerprint, ids, max_output_length, **options
        )

    def start(
        self,
        request: Request,
        on_prefill: Callable[[int], None] | None = None,
        document: Document | None = None,
        on_end: Callable[[DecodeState], None] | None = None,
    ) -> Run:
        """Returns a batch to iterate over, see Run; for programs that show answers as they come."""
        tokenizer = self.tokenizer if has_tokenizer(self.options.folder) else None
        cache = document and document.cache
        return Run(self.engine, self.params, tokenizer, request, on_prefill, cache, on_end)

    def read(
        self,
        document: Prompt,
        *,
        save_to: str | os.PathLike[str] | None = None,
        document_cache: str | os.PathLike[str] | None = None,
        document_cache_gib: float = math.inf,
        reserve: int | None = None,
        as_chat: bool = False,
        allow_untrained_length: bool = False,
        on_prefill: Callable[[int], None] | None = None,
    ) -> Document:
        """Reads a document once, for any number of questions.

        Args:
          document: a text or a list of ids.
          save_to: folder to save it to while it is read, with kv_compression after that. If it
            holds the beginning of the same document, reading goes on there; if all, it is opened.
          document_cache: folder that keeps many documents; this one is saved to a folder in it. The
            beginning that it shares with one of them is not read again.
          document_cache_gib: size of that folder; documents used least recently are deleted.
          reserve: tokens of question and answer that the rotary scaling leaves room for, where it
            depends on the length. None for the room up to the trained length, at least 1,024 and
            at most 32,768.
          as_chat: whether the text begins the first message of a chat, see `chat`. The model's
            template is put around it, and an empty line after it instead of white space.
          allow_untrained_length: whether to allow documents longer than the model serves.
          on_prefill: called after each chunk with the number of tokens read.

        Raises:
          UserError: the document is empty or too long, an option does not go with it, or the
            folder cannot be used; the message says why.
        """
        if as_chat:
            frame = chat_frame(self.tokenizer, document.rstrip())
            document = self.tokenizer.encode(frame.document, add_special_tokens=False)
        ids = self.encode(document)
        unread = unread_document(
            *(self.engine, self.options, self.fingerprint, ids, reserve, allow_untrained_length)
        )
        if document_cache is None:
            return read_document(self.engine, self.params, unread, save_to, on_prefill=on_prefill)
        if save_to is not None:
            raise UserError("save_to names one document's folder, document_cache many; give one.")
        most_bytes = document_cache_gib * 2**30
        return read_kept(self.engine, self.params, unread, document_cache, most_bytes, on_prefill)

    def open_document(self, folder: str | os.PathLike[str]) -> Document:
        """Opens a saved document, on any mesh.

        Raises:
          UserError: the folder holds no document, a part of one, one of another model, or a
            damaged one.
        """
        return open_document(self.engine, self.params, self.fingerprint, folder)

    def chat(self, document: Document) -> Chat:
        """Begins a chat about a document, whose turns run only what is new; see Chat.

        Turns follow the chat template if the document was read with `as_chat`. Else they go on.
        """
        return Chat(self, document)

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """What keys and values depend on: architecture, a sample of the weights, and options."""
        return fingerprint(self.config, self.options, self.params)

    def encode_after(self, document: Document | None, prompt: Prompt) -> tuple[int, ...]:
        """Returns the ids of a prompt, after those of the document if there is one."""
        if document is None:
            return self.encode(prompt)
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special_tokens=False)
        return (*document.token_ids, *map(int, prompt))
