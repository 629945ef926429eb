"""A document in memory: its token ids, and the keys and values that a model made of them."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lsjax.cache import DocumentCache
from lsjax.config import ModelConfig
from lsjax.documents.fingerprint import check_fingerprint
from lsjax.documents.folder import DocumentFolder, slice_tokens
from lsjax.documents.prefill import save_cache
from lsjax.inference.engine import Engine
from lsjax.inference.engine_config import EngineConfig
from lsjax.inference.options import Options
from lsjax.inference.request import Request, batches, bucket
from lsjax.inference.sparsity import Sparsity
from lsjax.runtime.errors import UserError
from lsjax.runtime.html import table


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A text that a model has read, for any number of questions.

    Attributes:
      token_ids: ids of the whole text.
      cache: its keys and values; None before the document is read.
      settled_length: length in tokens, with question and answer, that the rotary scaling was chosen
        for, at least the trained length, up to which it is the same; None if it does not depend
        on the length.
      fingerprint: what the keys and values depend on; see fingerprint.
      engine: engine of the model that has read it.
      compressed: number of its leading tokens that are compressed, if it was opened: another mesh
        may have read it. None for as many as this one compresses, or if none are.
      sparsity: what its tokens attended to while this process read them; None if to everything, or
        if they were all saved.
    """

    token_ids: tuple[int, ...]
    cache: DocumentCache | None
    settled_length: int | None
    fingerprint: dict[str, str]
    engine: Engine
    compressed: int | None = None
    sparsity: Sparsity | None = None

    @property
    def shared(self) -> int:
        """Number of leading tokens that questions do not run again."""
        border, _ = sharing_borders(self.engine.config, self.engine.settings)
        return len(self) // border * border

    @property
    def cached(self) -> int:
        """Number of leading tokens that are kept once for all questions; rows copy the rest."""
        if self.compressed is not None:
            return self.compressed
        return len(self) // self.border * self.border

    @property
    def border(self) -> int:
        """What the number of cached tokens is a multiple of."""
        return sharing_borders(self.engine.config, self.engine.settings)[1]

    def __len__(self) -> int:
        return len(self.token_ids)

    def begin(self, request: Request) -> Request:
        """Returns a request whose prompts, which begin with the document, are run after it."""
        longest = max(map(len, request.prompts))
        padding = [(*self.token_ids, 0)] * (len(request.prompts) - request.num_real)
        return dataclasses.replace(
            request,
            prompts=(*request.prompts[: request.num_real], *padding),
            prompt_capacity=self.shared + bucket(longest - self.shared),
            shared=self.shared,
            cached=self.cached,
            settled_length=self.settled_length,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the document to a folder, which LanguageModel.open_document reads on any mesh.

        Raises:
          UserError: the folder holds something else, or its disk is full.
        """
        held = new_folder(folder, self)
        with held.writing():
            if not held.complete:
                save_cache(self.engine, self.cache, held)

    def check_room(self, total: int) -> None:
        """Refuses more tokens, document, question and answer together, than it was read for.

        Raises:
          UserError: the rotary scaling was chosen for fewer tokens.
        """
        if self.settled_length is not None and total > self.settled_length:
            reserve = total - len(self)
            raise UserError(
                f"document, question and answer come to {total} tokens, but the rotary scaling of "
                f"the document was chosen for {self.settled_length}; ask for fewer tokens, or read "
                f"the document again with reserve {reserve}."
            )

    def _repr_html_(self) -> str:
        """Shows the document in a notebook."""
        settled = "any" if self.settled_length is None else f"{self.settled_length:,} tokens"
        return table(
            {
                "document": f"{len(self):,} tokens, {self.cached:,} of them kept once",
                "length with question and answer": settled,
                **({"attended to": str(self.sparsity)} if self.sparsity else {}),
                **self.fingerprint,
            }
        )


def requests_after(
    document: Document,
    options: Options,
    fingerprint: Mapping[str, str],
    ids: Sequence[tuple[int, ...]],
    max_output_length: int,
    **limits: Any,
) -> list[Request]:
    """Groups prompts that begin with a document into batches; see `batches`.

    Args:
      document: the document.
      options: options of the model that answers.
      fingerprint: that of the model that answers.
      ids: token ids of the prompts, the document's included.
      max_output_length: maximum number of tokens to generate.
      **limits: further arguments of `batches`.

    Raises:
      UserError: the document belongs to another model, a prompt has nothing after it, or see
        `batches`.
    """
    check_fingerprint("the document", document.fingerprint, fingerprint)
    there = document.engine.settings
    if (options.mesh, options.prefill_chunk) != (there.mesh, there.prefill_chunk):
        raise UserError(
            "the document was read on another mesh or in other chunks; save it, and open it with "
            "this model."
        )
    if empty := [i for i, prompt in enumerate(ids) if len(prompt) <= len(document)]:
        raise UserError(f"prompt {empty[0]} has no token after the document; give at least one.")
    document.check_room(max(map(len, ids)) + max_output_length)
    # Rows keep all of their own tokens.
    whole = dataclasses.replace(options, compression=None)
    found = batches(whole, ids, max_output_length, **limits)
    return [document.begin(request) for request in found]


def new_folder(path: str | os.PathLike[str], document: Document) -> DocumentFolder:
    """Creates the folder of a document, or opens the one that was begun for it.

    Raises:
      UserError: the folder holds something else, or several processes run the model.
    """
    if jax.process_count() > 1:
        raise UserError(
            "several processes do not save documents yet; read the document without a folder, or "
            "with one process."
        )
    config, settings = document.engine.config, document.engine.settings
    spec = settings.cache_spec(1, document.cached or 1, 0)
    token_bytes = -(-spec.nbytes(config) // spec.capacity)
    return DocumentFolder.create(
        path,
        document.token_ids,
        fingerprint=document.fingerprint,
        cached=document.cached,
        slice=slice_tokens(token_bytes, settings.prefill_chunk),
        settled_length=document.settled_length,
    )


def sharing_borders(config: ModelConfig, settings: EngineConfig) -> tuple[int, int]:
    """Returns what a document's numbers of shared and of cached tokens are multiples of.

    Chunks of a question begin at whole zigzag blocks. A quantized cache is read in whole blocks. A
    document is compressed up to the end of a block, in any format, so that meshes agree on it, and
    states of recurrent layers are saved there. Where a cache rolls, chunks begin at multiples of
    the chunk, and all shared tokens are cached.
    """
    in_blocks = settings.kv_cache_dtype in ("int8", "int4") or settings.compression is not None
    block = settings.cache_block if in_blocks or config.recurrences else 1
    shared = settings.zigzag.block_length or 1
    cached = math.lcm(shared, block)
    if any(config.windows):
        shared = cached = math.lcm(cached, settings.prefill_chunk)
    return shared, cached
