"""Tokenizers: text to token ids and back, chats included.

``load_tokenizer`` reads a model folder's tokenizer, whichever of the supported kinds it is.
"""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from lsjax.tokenizer import json_backend, sentencepiece_backend, tiktoken_backend
from lsjax.tokenizer.base import Progress, Tokenizer
from lsjax.tokenizer.config import read_config
from lsjax.tokenizer.detokenizer import StreamDecoder
from lsjax.tokenizer.errors import ChatTemplateError, TokenizerError

__all__ = [
    "ChatTemplateError",
    "Progress",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerError",
    "has_tokenizer",
    "load_tokenizer",
]

_SUPPORTED = (
    "supported are tokenizer.json (Hugging Face tokenizers), tokenizer.model (SentencePiece or "
    "tiktoken ranks) and *.tiktoken (tiktoken ranks)"
)
_RANKS_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
# The first field of a SentencePiece model is a piece, a length-delimited message.
_SENTENCEPIECE_START = b"\x0a"


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer's files, right or wrong."""
    return next(_candidates(Path(folder)), None) is not None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer in a model's folder.

    The kind of a file is told from its content. No code from the folder is run. Raises
    ``TokenizerError`` where there is no tokenizer or it can't be read.
    """
    folder = Path(folder)
    path = next(_candidates(folder), None)
    if path is None:
        raise TokenizerError(
            f"{folder} has no tokenizer file; {_SUPPORTED}. Fetch the file from the model's "
            "original release."
        )
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    config = read_config(folder)
    if content.lstrip().startswith(b"{"):
        return json_backend.load(path, content, config)
    if _RANKS_LINE.match(content):
        return tiktoken_backend.load(path, content, config)
    if content.startswith(_SENTENCEPIECE_START):
        return sentencepiece_backend.load(path, content, config)
    if content.startswith(b"version https://git-lfs"):
        raise TokenizerError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}."
        )
    raise TokenizerError(
        f"{path} is of an unknown kind; {_SUPPORTED}. The file may be damaged: fetch it again."
    )


def _candidates(folder: Path) -> Iterator[Path]:
    """The tokenizer files of a folder, the preferred first."""
    for pattern in ("tokenizer.json", "tokenizer.model", "*.tiktoken"):
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())
