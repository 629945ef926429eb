"""The documents of a corpus, read one at a time: texts, JSON lines, files of token ids.

Files are scanned once to find where documents begin. A document is read, and its text tokenized,
when it is requested.
"""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import decode, parse_json, read_text
from lsjax.tokenizer import Tokenizer

_SCANNED = 2**24  # tokens of a file scanned at a time


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens that belong together.

    Attributes:
      ids: [length] int32.
      weights: [length] float32 weight of each token as a target. The first one is not used,
        because no token precedes it.
    """

    ids: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The token ids of a model, and the tokenizer that makes them.

    Attributes:
      size: number of ids; all ids are below it.
      end: id of the token that ends a document. It is appended to a text that does not end with
        it, and it is the last token of each document in a token file. None: nothing is appended
        to texts, and a token file is one document.
      tokenizer: tokenizer for texts, or None.
    """

    size: int
    end: int | None
    tokenizer: Tokenizer | None


class Source(Protocol):
    """A file that holds documents."""

    path: str

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Document: ...


class Corpus:
    """The documents of all files, in the order of the files.

    Attributes:
      sources: the opened files.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self._ends = list(itertools.accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Document:
        at = bisect.bisect_right(self._ends, number)
        source = self.sources[at]
        return source[number - (self._ends[at] - len(source))]


def open_corpus(paths: Sequence[str], vocabulary: Vocabulary) -> Corpus:
    """Opens files as a corpus.

    Args:
      paths: the files. A *.jsonl file has one object per line, with "text", or with "ids" and
        optionally "weights", one number per id; other fields are ignored. A *.npy file is a
        one-dimensional integer array of token ids, which stays on disk. Any other file is a UTF-8
        text and one document.
      vocabulary: the model's.

    Raises:
      UserError: no file is given, a file does not exist, a *.npy file is invalid, a *.npy or
        *.jsonl file is empty, or a text file comes without a tokenizer. Errors within a document
        are raised when it is read.
    """
    if not paths:
        raise UserError("no data is given; name at least one file.")
    return Corpus([_open(path, vocabulary) for path in paths])


def _open(path: str, vocabulary: Vocabulary) -> Source:
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file; data are texts, *.jsonl and *.npy files.")
    kind = os.path.splitext(path)[1]
    kinds = {".jsonl": _JsonLines, ".npy": _TokenFile}
    return kinds.get(kind, _TextFile)(path, vocabulary)


class _TextFile:
    def __init__(self, path: str, vocabulary: Vocabulary):
        self.path, self._vocabulary = path, vocabulary
        _check_tokenizer(path, vocabulary)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> Document:
        return _of_text(read_text(self.path), self._vocabulary, self.path)


class _JsonLines:
    def __init__(self, path: str, vocabulary: Vocabulary):
        self.path, self._vocabulary = path, vocabulary
        self._lines, self._starts, at = [], [], 0
        with open(path, "rb") as f:
            for number, line in enumerate(f, start=1):
                if line.strip():
                    self._lines.append(number)
                    self._starts.append(at)
                at += len(line)
        if not len(self):
            raise UserError(f"{path} holds no document; put a JSON object on each line.")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Document:
        where = f"{self.path}, line {self._lines[number]},"
        with open(self.path, "rb") as f:
            f.seek(self._starts[number])
            line = f.readline()
        found = parse_json(decode(line, where), where)
        if not isinstance(found, dict) or ("text" in found) == ("ids" in found):
            raise UserError(f'{where} must be an object with either "text" or "ids".')
        if "ids" in found:
            return _of_ids(found["ids"], found.get("weights"), self._vocabulary, where)
        if not isinstance(found["text"], str):
            raise UserError(f'{where} has a "text" that is not a string.')
        if "weights" in found:
            raise UserError(
                f'{where} has "weights" for a text; they go with "ids", a number for each.'
            )
        _check_tokenizer(where, self._vocabulary)
        return _of_text(found["text"], self._vocabulary, where)


class _TokenFile:
    def __init__(self, path: str, vocabulary: Vocabulary):
        self.path, self._vocabulary = path, vocabulary
        try:
            self._ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as an array of token ids: {error}.") from None
        if self._ids.ndim != 1 or self._ids.dtype.kind not in "iu":
            raise UserError(
                f"{path} holds {self._ids.dtype} of shape {list(self._ids.shape)}; token ids are "
                "whole numbers in one dimension."
            )
        if not len(self._ids):
            raise UserError(f"{path} holds no token.")
        self._ends = self._documents(vocabulary.end)

    def _documents(self, end: int | None) -> np.ndarray:
        """Returns where each document ends; the last one ends at the end of the file."""
        ends = [np.zeros(0, np.int64)]
        if end is not None:
            for at in range(0, len(self._ids), _SCANNED):
                ends.append(at + 1 + np.flatnonzero(self._ids[at : at + _SCANNED] == end))
        found = np.concatenate(ends)
        if not len(found) or found[-1] < len(self._ids):
            found = np.append(found, len(self._ids))
        return found

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Document:
        begin, end = (self._ends[number - 1] if number else 0), self._ends[number]
        where = f"{self.path}, from token {begin:,} on,"
        return _of_ids(self._ids[begin:end], None, self._vocabulary, where)


def _check_tokenizer(where: str, vocabulary: Vocabulary) -> None:
    if vocabulary.tokenizer is None:
        raise UserError(
            f"{where} is text, but the model has no tokenizer; give the folder of one, or token "
            "ids."
        )


def _of_text(text: str, vocabulary: Vocabulary, where: str) -> Document:
    ids = vocabulary.tokenizer.encode(text)
    if vocabulary.end is not None and ids[-1:] != [vocabulary.end]:
        ids.append(vocabulary.end)
    return _of_ids(ids, None, vocabulary, where)


def _of_ids(ids: Any, weights: Any, vocabulary: Vocabulary, where: str) -> Document:
    ids = _numbers(ids, "iu", f"{where} must hold whole numbers as token ids, in one list.")
    outside = ids[(ids < 0) | (ids >= vocabulary.size)]
    if len(outside):
        raise UserError(
            f"{where} holds the token id {outside[0]}, which is outside the model's vocabulary of "
            f"{vocabulary.size}."
        )
    if weights is None:
        return Document(ids.astype(np.int32), np.ones(len(ids), np.float32))
    wrong = f"{where} must hold a weight for each of its {len(ids)} ids, a number from 0."
    weights = _numbers(weights, "iuf", wrong)
    if len(weights) != len(ids) or not np.all((weights >= 0) & np.isfinite(weights)):
        raise UserError(wrong)
    return Document(ids.astype(np.int32), weights.astype(np.float32))


def _numbers(values: Any, kinds: str, wrong: str) -> np.ndarray:
    try:
        found = np.asarray(values)
    except ValueError:  # ragged lists
        raise UserError(wrong) from None
    if found.ndim != 1 or (found.size and found.dtype.kind not in kinds):
        raise UserError(wrong)
    return found
