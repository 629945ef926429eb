"""Converts text and chats to token ids, and ids back to text.

``load_tokenizer`` loads the tokenizer in a model folder, of any supported kind.
"""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from lsjax.runtime.errors import ChatTemplateError, TokenizerError
from lsjax.tokenizer import json_backend, sentencepiece_backend, tiktoken_backend
from lsjax.tokenizer.base import Progress, Tokenizer
from lsjax.tokenizer.config import read_config
from lsjax.tokenizer.detokenizer import StreamDecoder

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
# The first field of a SentencePiece model is a length-delimited message, a piece.
_SENTENCEPIECE_START = b"\x0a"


def has_tokenizer(folder: str | Path) -> bool:
    """Returns whether a folder holds tokenizer files, valid or not."""
    return next(_candidates(Path(folder)), None) is not None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the tokenizer in a model folder.

    The content of a file decides its kind. No code from the folder is run. Raises
    ``TokenizerError`` if there is no tokenizer or it can't be read.
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
    """Yields the tokenizer files in a folder, in order of preference."""
    for pattern in ("tokenizer.json", "tokenizer.model", "*.tiktoken"):
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())
