"""What a tokenizer folder may hold, and what is said of one that can't be used."""

import json
import shutil

import pytest

from lsjax.tokenizer import ChatTemplateError, TokenizerError, load_tokenizer

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def folder(golden, tmp_path):
    """Copies a committed tokenizer to a folder that a test may change."""

    def copy(kind, without=()):
        for path in (golden / kind).iterdir():
            if path.name not in without:
                shutil.copy(path, tmp_path)
        return tmp_path

    return copy


def change_config(folder, **settings):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**config, **settings}), encoding="utf-8")


# ---- Kinds of files ------------------------------------------------------------------------------


def test_ranks_are_recognised_by_content(folder):
    path = folder("tiktoken")
    ids = load_tokenizer(path).encode("The boat")
    (path / "tokenizer.model").rename(path / "small.tiktoken")
    assert load_tokenizer(path).encode("The boat") == ids


def test_tokenizer_json_is_preferred(folder, golden, expected):
    path = folder("sentencepiece")
    shutil.copy(golden / "byte_level_json" / "tokenizer.json", path)
    (path / "tokenizer_config.json").unlink()
    cases = expected["byte_level_json"]
    assert load_tokenizer(path).encode(cases["texts"][1]) == cases["ids"][1]


def test_llama_3_special_tokens_follow_the_ranks(folder):
    path = folder("tiktoken", without=["tokenizer_config.json"])
    tokenizer = load_tokenizer(path)
    ranks = len((path / "tokenizer.model").read_bytes().splitlines())
    assert tokenizer.vocab_size == ranks + 256
    assert tokenizer.bos_id == ranks
    assert tokenizer.eos_ids == (ranks + 1, ranks + 9)
    text = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|reserved_special_token_250|>"
    ids = tokenizer.encode(text)
    assert ids[:2] == [ranks, ranks + 6]
    assert ids[-2:] == [ranks + 9, ranks + 255]
    assert ranks + 7 in ids
    assert tokenizer.decode(ids) == "user\n\nhi"


def test_baichuan_prompts_begin_without_bos(folder):
    path = folder("sentencepiece")
    change_config(path, tokenizer_class="BaichuanTokenizer", add_bos_token=None)
    assert load_tokenizer(path).encode("boat")[0] != 1
    change_config(path, tokenizer_class="LlamaTokenizer")
    assert load_tokenizer(path).encode("boat")[0] == 1


@pytest.mark.parametrize("kind", ["byte_level_json", "metaspace_json", "sentencepiece", "tiktoken"])
def test_eos_is_added_where_the_folder_says_so(kind, folder):
    path = folder(kind)
    change_config(path, add_eos_token=True)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("boat")[-1:] == list(tokenizer.eos_ids)
    assert tokenizer.encode("boat", add_special_tokens=False)[-1:] != list(tokenizer.eos_ids)


def test_without_legacy_no_space_goes_before_text_after_a_special_token(folder):
    path = folder("sentencepiece")
    legacy = load_tokenizer(path)
    change_config(path, legacy=False)
    tokenizer = load_tokenizer(path)
    text = "boat</s>boat"
    assert legacy.decode(legacy.encode(text), skip_special_tokens=False) == "<s> boat</s> boat"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == "<s> boat</s>boat"


def test_added_tokens_may_be_in_the_config_alone(folder):
    path = folder("byte_level_json")
    size = load_tokenizer(path).vocab_size
    change_config(path, added_tokens_decoder={str(size): {"content": "<new>", "special": True}})
    assert load_tokenizer(path).encode("<new>") == [size]


def test_code_in_the_folder_is_never_run(folder):
    path = folder("tiktoken")
    (path / "tokenization_chatglm.py").write_text("raise SystemExit('ran')")
    assert load_tokenizer(path).decode(load_tokenizer(path).encode("boat")) == "boat"


# ---- Damaged and missing files -------------------------------------------------------------------


def cut_short(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3 + 1])


def test_an_empty_folder_is_told_what_it_needs(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer file.*tokenizer\.json.*tiktoken"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("byte_level_json", "tokenizer.json"),
        ("sentencepiece", "tokenizer.model"),
        ("tiktoken", "tokenizer.model"),
        ("tiktoken", "tokenizer_config.json"),
    ],
)
def test_a_file_cut_short_is_named(kind, name, folder):
    path = folder(kind) / name
    cut_short(path)
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(path.parent)
    assert str(path) in str(error.value)
    assert "fetch it again" in str(error.value) or "restore" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x80\x04\x95 a pickle", "unknown kind"),
        (b"", "unknown kind"),
        (b"{}", "damaged"),
    ],
)
def test_a_file_of_another_kind_is_refused(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("byte_level_json", {"eos_token": "<nowhere>"}, "'<nowhere>'.*eos_token"),
        ("sentencepiece", {"bos_token": "<nowhere>"}, "'<nowhere>'.*bos_token"),
        ("tiktoken", {"eos_token": "<nowhere>"}, "'<nowhere>'"),
        ("tiktoken", {"tokenizer_class": "OtherTokenizer"}, "'OtherTokenizer'.*supported"),
        ("tiktoken", {"added_tokens_decoder": {"5": {"content": "<five>"}}}, "both define id 5"),
        ("tiktoken", {"added_tokens_decoder": ["<five>"]}, "unexpected form"),
        ("tiktoken", {"chat_template": 3}, "unexpected form"),
        ("byte_level_json", {"added_tokens_decoder": {"7": {"content": "<think>"}}}, "says 7"),
    ],
)
def test_contradictions_are_told(kind, settings, message, folder):
    path = folder(kind)
    change_config(path, **settings)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(path)


def test_an_unknown_decoder_is_refused(folder):
    path = folder("byte_level_json") / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"WordPiece.*supported are"):
        load_tokenizer(path.parent)


# ---- Chats ---------------------------------------------------------------------------------------


def test_a_template_file_wins_over_the_config(folder):
    path = folder("tiktoken")
    (path / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    assert load_tokenizer(path).render_chat(USER) == "file: hi"


def test_a_given_template_wins_over_the_folder(folder):
    tokenizer = load_tokenizer(folder("tiktoken"))
    template = "{{ messages[0].content }}{{ eos_token }}"
    assert tokenizer.render_chat(USER, chat_template=template) == "hi<|endoftext|>"
    assert tokenizer.encode_chat(USER, chat_template=template)[-1:] == list(tokenizer.eos_ids)


def test_a_chat_without_a_template_is_refused(folder):
    tokenizer = load_tokenizer(folder("tiktoken", without=["tokenizer_config.json"]))
    with pytest.raises(ChatTemplateError, match="--chat_template"):
        tokenizer.encode_chat(USER)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_failing_template_is_one_clear_error(template, message, folder):
    tokenizer = load_tokenizer(folder("tiktoken"))
    with pytest.raises(ChatTemplateError, match=message):
        tokenizer.render_chat(USER, chat_template=template)


def test_a_chat_needs_messages(folder):
    with pytest.raises(ChatTemplateError, match="at least one message"):
        load_tokenizer(folder("tiktoken")).render_chat([])
