"""Data files: what is a document, and what is refused."""

import json

import numpy as np
import pytest

from lsjax.runtime.errors import UserError
from lsjax.shipped import shipped_model_path
from lsjax.shipped.model import END
from lsjax.tokenizer import load_tokenizer
from lsjax.training.documents import Vocabulary, open_corpus


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(264, END, load_tokenizer(shipped_model_path()))


def write(folder, name, content):
    path = folder / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content.encode())
    return str(path)


def lines(*objects):
    return "\n".join(map(json.dumps, objects))


def read(corpus):
    return [corpus[i].ids.tolist() for i in range(len(corpus))]


def test_files_of_every_kind_one_after_the_other(tmp_path, vocabulary):
    files = [
        write(tmp_path, "a.txt", "Hé"),
        write(tmp_path, "b.jsonl", lines({"text": "a", "url": "x"}) + "\n\r\n" + '{"ids": [7]}\n'),
        write(tmp_path, "c.npy", np.array([1, 2, END, 3, END, END, 4], np.uint16)),
    ]
    corpus = open_corpus(files, vocabulary)
    assert read(corpus) == [
        [*"Hé".encode(), END], [97, END], [7], [1, 2, END], [3, END], [END], [4]
    ]  # fmt: skip
    assert all(corpus[i].weights.tolist() == [1] * len(corpus[i].ids) for i in range(7))


def test_a_token_file_may_end_with_an_end_or_have_none(tmp_path, vocabulary):
    whole = write(tmp_path, "a.npy", np.array([1, END, 2, END], np.int64))
    assert read(open_corpus([whole], vocabulary)) == [[1, END], [2, END]]
    assert read(open_corpus([whole], Vocabulary(264, None, None))) == [[1, END, 2, END]]


def test_weights_go_with_ids(tmp_path, vocabulary):
    file = write(tmp_path, "a.jsonl", lines({"ids": [1, 2, 3], "weights": [0, 1, 0.5]}))
    assert open_corpus([file], vocabulary)[0].weights.tolist() == [0, 1, 0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1, is not valid JSON"),
        (lines({"text": "a"}, {"prompt": "a"}), "line 2, must be an object"),
        (lines({"text": "a", "ids": [1]}), 'either "text" or "ids"'),
        (lines({"text": 3}), "not a string"),
        (lines({"ids": [1, 264]}), "token id 264, .* vocabulary of 264"),
        (lines({"ids": [-1]}), "token id -1"),
        (lines({"ids": [1.5]}), "whole numbers"),
        (lines({"ids": [[1], [2]]}), "whole numbers"),
        (lines({"ids": [1, [2]]}), "whole numbers"),
        (lines({"ids": "12"}), "whole numbers"),
        (lines({"ids": [1, 2], "weights": [1]}), "a weight for each of its 2 ids"),
        (lines({"ids": [1], "weights": [-1]}), "a number from 0"),
        (lines({"ids": [1], "weights": [float("nan")]}), "a number from 0"),
        (lines({"text": "a", "weights": [1]}), 'go with "ids"'),
        ("\n\n", "holds no document"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path, vocabulary, content, message):
    file = write(tmp_path, "a.jsonl", content)
    with pytest.raises(UserError, match=message):
        read(open_corpus([file], vocabulary))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), np.int32), r"int32 of shape \[2, 2\]"),
        (np.zeros(3), "float64"),
        (np.array([{}], object), "cannot be read"),
        (np.zeros(0, np.int32), "no token"),
        (np.array([1, 300]), "from token 0 on, holds the token id 300"),
    ],
)
def test_arrays_that_are_wrong_are_named(tmp_path, vocabulary, array, message):
    file = write(tmp_path, "a.npy", array)
    with pytest.raises(UserError, match=message):
        read(open_corpus([file], vocabulary))


def test_text_needs_a_tokenizer_and_files_must_be_there(tmp_path, vocabulary):
    for name, content in (("a.txt", "a"), ("a.jsonl", lines({"text": "a"}))):
        with pytest.raises(UserError, match="has no tokenizer"):
            read(open_corpus([write(tmp_path, name, content)], Vocabulary(264, None, None)))
    with pytest.raises(UserError, match="is not a file"):
        open_corpus([str(tmp_path / "none.txt")], vocabulary)
    with pytest.raises(UserError, match="at least one file"):
        open_corpus([], vocabulary)
