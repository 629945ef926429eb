"""Make the small tokenizers of the tests and what the reference libraries say of them.

Needs transformers, tokenizers, sentencepiece and tiktoken. Run it as ``python make.py``; it writes
beside itself. Its results are committed, so that the tests need no reference library.
"""

import base64
import io
import json
import shutil
from pathlib import Path

import sentencepiece
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

HERE = Path(__file__).parent

SENTENCES = """
The river was wide and the boat was small, but nobody in the boat was afraid of the river.
"Why don't we wait?" she asked. "We'll be there by 10:45, I'm sure they're not leaving before 11."
He'd counted 1234567 stars, 89 boats and 3.14159 pies; the total (in base 16) was 0x12D687.
In the morning the wind came from the north, and in the evening the wind came from the south.
def area(width, height):
    return width * height  # the area of the rectangle
for i in range(10):
        if i % 2 == 0: print(f"{i} is even", end="\\n\\n")
河流很宽，船很小，但是船上没有人害怕这条河。“我们为什么不等一等？”她问。
早上的风从北方来，晚上的风从南方来。今天的天气很好，我们去看大海吧！
Été, naïve, Straße, señor, Ελλάδα, Москва, ﬁn, 한국어, नमस्ते 🙂🚀👩‍🚀
if a < b and c > d: print("<b>wide</b> <s>south</s> <i>wind</i>"); assert s<s>s
"""
# Runs of white space and what follows them, for tokens that hold several at once.
RUNS = "wait!\n\n\nwait.\n\n    wait   wait  wait\n  \n\t\twait?!\n// wait\r\n\r\n" * 8

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = [
    "",
    "The boat was small.",
    " leading and trailing spaces  ",
    "It's what they'LL say: don't, won't, I'M, we'd've.",
    "def f(x):\n    if x:\n\t\treturn [x, x ** 2]  # twice\n\n\n",
    "tabs\t\tand   runs    of\n\n \n   white \r\n\r\n space\u3000\u00a0\u2003.",
    "河流很宽，船很小！今天的天气很好。",
    "混合 English 和中文，1234567 and 3.14。",
    "emoji 🙂🚀👩‍🚀👨‍👩‍👧 and flags 🇫🇷, rare 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀",
    "e\u0301 versus é, ﬁ ligature, Å Ω 한국어 नमस्ते",
    "\u2581 the space mark, <0x41> a byte's name, \x00 and \x7f controls",
]

MESSAGES = [
    [{"role": "user", "content": "Why don't we <b>wait</b> & see?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好 🙂"},
        {"role": "assistant", "content": "Hello.\n"},
        {"role": "user", "content": 'Say "hi"\nagain.', "name": None},
    ],
]

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
GLM = (
    "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}<|{{ item['role'] }}|>"
    "{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
    {% continue %}
{% endif %}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message | tojson }}{{ eos_token }}{% endgeneration %}
{% else %}
[INST] {{ message['content'] | trim }} {{ 'name' in message }} [/INST]
{% endif %}
{% endfor %}
"""


def train_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*SENTENCES.splitlines(keepends=True), RUNS],
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def make_json(folder: Path) -> PreTrainedTokenizerFast:
    backend = train_byte_level()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = CHATML
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_config(
        folder,
        tokenizer_class="PreTrainedTokenizerFast",
        add_bos_token=False,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
    return tokenizer


def make_tiktoken(folder: Path) -> tiktoken.Encoding:
    characters = bytes_of_characters()
    vocab = train_byte_level().get_vocab()
    ranks = {bytes(characters[c] for c in token): rank for token, rank in vocab.items()}
    lines = [
        base64.b64encode(token) + b" " + str(rank).encode()
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    names = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
    specials = {name: len(ranks) + i for i, name in enumerate(names)}
    write_config(
        folder,
        tokenizer_class="ChatGLM4Tokenizer",
        auto_map={"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
        added_tokens_decoder={
            str(i): {"content": name, "special": True} for name, i in specials.items()
        },
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=GLM,
    )
    return tiktoken.Encoding(
        "small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


def bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = {}
    for point in range(0x800):
        written = level.pre_tokenize_str(chr(point))[0][0]
        found.update(zip(written, chr(point).encode(), strict=True))
    # The bytes that begin longer characters, and those that no character holds, follow in order.
    written = sorted(set(level.alphabet()) - set(found), key=ord)
    missing = sorted(set(range(256)) - set(found.values()))
    return found | dict(zip(written, missing, strict=True))


def make_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES.splitlines(), *RUNS.splitlines()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    write_config(
        folder,
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
        bos_token={"__type": "AddedToken", "content": "<s>"},
        eos_token={"__type": "AddedToken", "content": "</s>"},
        unk_token="<unk>",
        legacy=True,
        chat_template=[{"name": "default", "template": LLAMA}, {"name": "rag", "template": "x"}],
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_config(folder: Path, **settings: object) -> None:
    text = json.dumps(settings, ensure_ascii=False, indent=1)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def cases(texts, encode, decode, decode_all, render) -> dict:
    ids = [encode(text) for text in texts]
    return {
        "texts": texts,
        "ids": ids,
        "decoded": [decode(i) for i in ids],
        "decoded_with_special_tokens": [decode_all(i) for i in ids],
        "messages": MESSAGES,
        "prompts": [render(messages, True) for messages in MESSAGES],
        "chats": [render(messages, False) for messages in MESSAGES],
    }


def main() -> None:
    folders = [
        HERE / name for name in ("byte_level_json", "tiktoken", "sentencepiece", "metaspace_json")
    ]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    byte_level, ranks, pieces, metaspace = folders

    fast = make_json(byte_level)

    def render_with(template, **named):
        def render(messages, add_generation_prompt):
            return fast.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **named,
            )

        return render

    expected = {}
    expected["byte_level_json"] = cases(
        [*TEXTS, "<|im_start|>user\n<think> hm<|im_end|>\n <|endoftext|>x<|im_star"],
        lambda text: fast.encode(text),
        lambda ids: fast.decode(ids, skip_special_tokens=True),
        lambda ids: fast.decode(ids),
        render_with(CHATML),
    )

    encoding = make_tiktoken(ranks)
    special_ids = set(encoding._special_tokens.values())
    expected["tiktoken"] = cases(
        [*TEXTS, "[gMASK]<sop><|user|>\nhm <|assistant|> x<|endoftext|>"],
        lambda text: [
            *encoding.encode("[gMASK]<sop>", allowed_special="all"),
            *encoding.encode(text, allowed_special="all"),
        ],
        lambda ids: encoding.decode([i for i in ids if i not in special_ids]),
        encoding.decode,
        render_with(GLM),
    )

    processor = make_sentencepiece(pieces)
    slow = SentencePieceBackend(
        vocab_file=str(pieces / "tokenizer.model"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        legacy=True,
    )
    llama = LlamaTokenizer.from_pretrained(pieces)
    expected["sentencepiece"] = cases(
        [*TEXTS, "<s>hm </s> x</s><s>", "a<unk> b"],
        lambda text: [processor.bos_id(), *slow.encode(text, add_special_tokens=False)],
        lambda ids: processor.decode([i for i in ids if i != processor.unk_id()]),
        lambda ids: llama.decode(ids),
        render_with(LLAMA, bos_token="<s>", eos_token="</s>"),
    )

    llama.backend_tokenizer.save(str(metaspace / "tokenizer.json"))
    shutil.copy(pieces / "tokenizer_config.json", metaspace)
    expected["metaspace_json"] = cases(
        [*TEXTS, "<s>hm </s> x</s><s>", "a<unk> b"],
        lambda text: llama.encode(text),
        lambda ids: llama.decode(ids, skip_special_tokens=True),
        lambda ids: llama.decode(ids),
        render_with(LLAMA, bos_token="<s>", eos_token="</s>"),
    )

    text = json.dumps(expected, ensure_ascii=False, separators=(",", ":"))
    (HERE / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
