"""Reads a document for a program, with a progress bar and a line that says how long it took."""

import time
from collections.abc import Sequence
from typing import Any

from lsjax.cli.program import say
from lsjax.documents import Document
from lsjax.language_model import LanguageModel
from lsjax.runtime.progress import PrefillBar


def read_document(model: LanguageModel, ids: Sequence[int], **options: Any) -> Document:
    """Reads or opens a document; see LanguageModel.read for the options."""
    start = time.perf_counter()
    document = model.read(ids, on_prefill=PrefillBar(model.config, len(ids)), **options)
    seconds = time.perf_counter() - start
    say(f"document   {len(document):,} tokens in {seconds:.2f} s, compiling included")
    return document
