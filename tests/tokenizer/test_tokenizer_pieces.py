"""Long text encoded piece by piece has the ids it has as a whole."""

import json
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lsjax.tokenizer import load_tokenizer, pieces

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def byte_level(*patterns, **level):
    """Changes a byte-level tokenizer.json to split by other patterns."""
    steps = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in patterns
    ]
    last = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": not patterns,
        **level,
    }
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]}}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
LLAMA = {
    "pre_tokenizer": None,
    "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]},
}
GEMMA = {
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
    "normalizer": REPLACE,
}
CUT = {
    "tiktoken": ("tiktoken", None),
    "sentencepiece": ("sentencepiece", None),
    "llama 3": ("byte_level_json", {}),
    "gpt-2": ("byte_level_json", byte_level()),
    "gpt-2, spelled out": ("byte_level_json", byte_level(GPT2)),
    "o200k": ("byte_level_json", byte_level(O200K)),
    "deepseek": ("byte_level_json", byte_level(*DEEPSEEK)),
    "metaspace": ("metaspace_json", {}),
    "llama": ("metaspace_json", LLAMA),
    "gemma": ("metaspace_json", GEMMA),
}


def load(golden, folder, kind, changes):
    """A committed tokenizer, its tokenizer.json changed."""
    if changes is None:
        return load_tokenizer(golden / kind)
    spec = json.loads((golden / kind / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**spec, **changes}), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=list(CUT.values()), ids=list(CUT))
def tokenizer(request, golden, tmp_path_factory):
    return load(golden, tmp_path_factory.mktemp("tokenizer"), *request.param)


def encode(tokenizer, text, size):
    """The ids of ``text`` cut into pieces of ``size`` characters, and their number of pieces."""
    done = []
    with mock.patch.object(pieces, "PIECE_CHARACTERS", size):
        ids = tokenizer.encode(text, progress=done.append)
    assert sum(done) == len(text)
    return ids, len(list(filter(None, done)))


FRAGMENTS = [
    *(
        "boat",
        "river",
        "The",
        "wait",
        "afraid",
        "area",
        "don't",
        "I'LL",
        "e\u0301",
        "\u0301",
        "🙂",
        "👩‍🚀",
    ),
    *(
        " ",
        " ",
        " ",
        "  ",
        "\n",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u3000",
        "\u00a0",
        "\u2028",
        "\x1c",
        "▁",
    ),
    *("河流很", "船", "，", "。", "！", "今天的天气很好", "カ", "\u3099", "한국어", "नमस्ते"),
    *("7", "123456", " 10", "3.14", ".", "!", "?!", "/", "//", "(", "'", "_", "#", "\x00", "ﬁ"),
    *("<|im_start|>", "<|im_end|>", "<think>", "<|user|>", "[gMASK]", "<s>", "</s>", "<unk>", "<|"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=60).map("".join)


@given(text=TEXTS, size=st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_pieces_have_the_ids_of_the_whole(tokenizer, text, size):
    whole, _ = encode(tokenizer, text, len(text) + 1)
    assert encode(tokenizer, text, size)[0] == whole


PATTERNS = [name for name, (kind, _) in CUT.items() if kind == "byte_level_json"]


@pytest.fixture(scope="module", params=PATTERNS)
def pre_tokenizer(request, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pattern")
    return load(golden, folder, *CUT[request.param]).backend.pre_tokenizer


@given(text=TEXTS, size=st.integers(1, 20))
@example(text="wait!\n/ wait", size=1)
@settings(max_examples=60, deadline=None)
def test_cuts_are_where_the_pattern_splits(pre_tokenizer, text, size):
    """Whatever the vocabulary, nothing could be merged across a cut."""
    parts = pieces.pieces(text, pieces.after_words, size)
    split = [word for part in parts for word, _ in pre_tokenizer.pre_tokenize_str(part)]
    assert split == [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]


TRICKY = [
    "wait\n\n\nwait \n\nwait\n\n wait",
    "wait    wait  \n  wait!\n\n  wait",
    "?!\n// wait /\n/wait\n/ wait.\n'll",
    "boat<s> wait </s>wait <s>wait  <s>  wait<s>",
    "river <|im_end|> wait<|im_end|> wait<|user|> wait",
    "船，船。。船 ，7，7。！\n，船\n船\n\n船",
    "a\n\u0301b e \u0301 カ\u3099 e\u0301，",
]


@pytest.mark.parametrize("text", TRICKY)
def test_no_size_of_piece_changes_ids(tokenizer, text):
    whole, _ = encode(tokenizer, text, len(text) + 1)
    assert all(encode(tokenizer, text, size)[0] == whole for size in range(2, len(text)))


def test_prose_is_cut_and_its_progress_told(tokenizer):
    _, parts = encode(tokenizer, "The boat was small, the river wide.\n" * 20, 100)
    assert parts > 5


def test_chinese_without_spaces_is_cut(golden):
    text = "早上的风从北方来，晚上的风从南方来。" * 20
    for kind in ("tiktoken", "byte_level_json", "sentencepiece"):
        assert encode(load_tokenizer(golden / kind), text, 50)[1] > 3, kind


UNKNOWN = {
    "a pattern that reaches over spaces": ("byte_level_json", byte_level(r"\p{L}+ \p{L}+|\s+")),
    "a space put before each text": ("byte_level_json", byte_level(add_prefix_space=True)),
    "an unknown normalizer": ("byte_level_json", {"normalizer": {"type": "Lowercase"}}),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_text_stays_whole_where_no_safe_cut_is_known(change, golden, tmp_path):
    tokenizer = load(golden, tmp_path, *change)
    text = "The boat was small, the river wide.\n" * 20
    assert encode(tokenizer, text, 20) == encode(tokenizer, text, len(text) + 1)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_look_around_them_keep_text_whole(flag, golden, tmp_path):
    path = golden / "byte_level_json" / "tokenizer.json"
    added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
    changes = {"added_tokens": [{**token, flag: True} for token in added]}
    tokenizer = load(golden, tmp_path, "byte_level_json", changes)
    text = "a <|im_end|> boat <|im_end|>\nand <think> so <think> on"
    whole = encode(tokenizer, text, len(text) + 1)
    assert all(encode(tokenizer, text, size) == whole for size in range(2, 20))


def test_tokens_with_spaces_are_never_cut(golden, tmp_path):
    path = golden / "byte_level_json" / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    last = spec["added_tokens"][-1]
    token = {**last, "id": last["id"] + 1, "content": "<a b>", "special": True}
    changes = {"added_tokens": [*spec["added_tokens"], token]}
    tokenizer = load(golden, tmp_path, "byte_level_json", changes)
    text = "wait<a b> wait <a b>wait"
    for size in range(2, len(text)):
        assert encode(tokenizer, text, size)[0].count(token["id"]) == 2


def test_a_million_spaces_are_read(golden):
    """More than tiktoken's search for the end of white space can take in one go."""
    tokenizer = load_tokenizer(golden / "tiktoken")
    text = f"a{' ' * 1_000_000}b"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
