"""Reading documents, and opening saved ones."""

import contextlib
import dataclasses
import os
from collections.abc import Callable

from lsjax.documents.document import Document, new_folder
from lsjax.documents.fingerprint import check_fingerprint
from lsjax.documents.folder import DocumentFolder
from lsjax.documents.prefill import prefill_document
from lsjax.inference.engine import Engine
from lsjax.inference.engine_config import EngineConfig
from lsjax.inference.options import Options
from lsjax.inference.request import check_ids, check_lengths
from lsjax.positions.dual_chunk import settled_length
from lsjax.positions.rotary import depends_on_length
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note

# Tokens of question and answer that a document leaves room for, if nothing else is asked for.
_LEAST_RESERVE, _MOST_RESERVE = 1024, 32768


def read_document(
    engine: Engine,
    params: dict,
    document: Document,
    save_to: str | os.PathLike[str] | None = None,
    begins_as: tuple[DocumentFolder | None, int] = (None, 0),
    on_prefill: Callable[[int], None] | None = None,
) -> Document:
    """Reads a document that `unread_document` has returned.

    Args:
      engine: engine of the model.
      params: model parameters.
      document: the document.
      save_to: folder to save it to, and to go on from; None for none.
      begins_as: a saved document that begins with as many of the same tokens, which are copied
        instead of read; (None, 0) for none.
      on_prefill: see prefill_document.
    """
    if save_to is None:
        return prefill_document(engine, params, document, None, on_prefill)
    folder, (other, tokens) = new_folder(save_to, document), begins_as
    document = _as_compressed(document, folder)
    with contextlib.nullcontext() if folder.complete else folder.writing():
        if other is not None and not folder.manifest.done:
            folder.copy_from(other, tokens)
        return prefill_document(engine, params, document, folder, on_prefill)


def unread_document(
    engine: Engine,
    options: Options,
    fingerprint: dict[str, str],
    ids: tuple[int, ...],
    reserve: int | None,
    allow_untrained_length: bool,
) -> Document:
    """Checks a document that is to be read; see LanguageModel.read for the arguments.

    Raises:
      UserError: it cannot be read; the message says why.
    """
    check_options(options)
    check_ids(options.config, ids)
    if reserve is not None and reserve < 1:
        raise UserError(f"reserve must be at least 1 token, not {reserve}.")
    trained, by_length = options.config.trained_length, depends_on_length(options.config)
    room = reserve or min(max(trained - len(ids), _LEAST_RESERVE), _MOST_RESERVE)
    check_lengths(options, [ids], room if by_length else 1, None, allow_untrained_length)
    if by_length and len(ids) <= trained < len(ids) + room:
        note(
            f"the document's {len(ids):,} tokens and {room:,} of question and answer are more than "
            f"the {trained:,} that the model was trained for: rotary scaling is on."
        )
    return Document(
        token_ids=ids,
        cache=None,
        settled_length=settled_length(options.config, len(ids) + room) if by_length else None,
        fingerprint=fingerprint,
        engine=engine,
    )


def open_document(
    engine: Engine, params: dict, fingerprint: dict[str, str], path: str | os.PathLike[str]
) -> Document:
    """Opens a saved document; see LanguageModel.open_document."""
    check_options(engine.settings)
    folder = DocumentFolder.open(path)
    manifest = folder.manifest
    check_fingerprint(folder.path, manifest.fingerprint, fingerprint)
    if not folder.complete:
        raise UserError(
            f"{folder.path} holds {manifest.done} of {manifest.cached} tokens; read the same "
            "document into it to go on."
        )
    document = Document(
        token_ids=folder.token_ids(),
        cache=None,
        settled_length=manifest.settled_length,
        fingerprint=fingerprint,
        engine=engine,
    )
    document = _as_compressed(document, folder)
    return prefill_document(engine, params, document, folder)


def _as_compressed(document: Document, folder: DocumentFolder) -> Document:
    """Returns a document with as many tokens compressed as in the folder that holds it.

    Raises:
      UserError: rows of this mesh begin at other tokens.
    """
    cached = folder.manifest.cached
    if not (document.engine.by_layer and folder.complete) or cached == document.cached:
        return document
    if cached % document.border:
        raise UserError(
            f"{folder.path} was compressed at {cached} tokens, but on this mesh with this "
            f"prefill_chunk rows begin at multiples of {document.border}; open it on a smaller "
            "context axis, or read the document again into another folder."
        )
    return dataclasses.replace(document, compressed=cached)


def check_options(options: EngineConfig) -> None:
    """Refuses what documents do not go with.

    Raises:
      UserError: the kv_compression is not one of whole layers.
    """
    if options.compression is not None and not options.compression.by_layer:
        raise UserError(
            "documents do not go with a kv_compression that forgets while it reads (streaming_llm, "
            "or razor with streaming): there is little to keep, and it depends on prefill_chunk; "
            "set kv_compression razor without streaming, or none."
        )
