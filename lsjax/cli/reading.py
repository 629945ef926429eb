"""Loads a model and reads a document for a program, with progress bars."""

import time
from collections.abc import Sequence
from typing import Any

from lsjax.checkpoint import checkpoint_bytes
from lsjax.cli.program import say
from lsjax.documents import Document
from lsjax.inference.options import Options
from lsjax.language_model import LanguageModel, load_from_options
from lsjax.runtime.progress import PrefillBar, byte_bar


def load_model(options: Options) -> LanguageModel:
    """Loads a model, with a bar of the bytes read."""
    with byte_bar("load", checkpoint_bytes(options.folder, options.config)) as bar:
        return load_from_options(options, bar.update)


def read_document(model: LanguageModel, ids: Sequence[int], **options: Any) -> Document:
    """Reads or opens a document, and says how long it took; see LanguageModel.read."""
    start = time.perf_counter()
    document = model.read(ids, on_prefill=PrefillBar(model.config, len(ids)), **options)
    seconds = time.perf_counter() - start
    say(f"document   {len(document):,} tokens in {seconds:.2f} s, compiling included")
    if document.sparsity:
        say(f"attended   to {document.sparsity}")
    return document
