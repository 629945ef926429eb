"""Makes model folders as transformers saves them, and its greedy tokens from them.

Needs transformers 5.24, tokenizers and torch on the CPU:

    python tests/golden/saved/make.py

Writes one folder per case beside itself, by `save_pretrained` of the model and of its tokenizer,
with expected.json: the rendered chat, its token ids and the tokens that transformers answers from
the saved folder in float32.
"""

import itertools
import json
import pathlib
import shutil

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
CORPUS = (HERE.parents[2] / "examples/passkey_2048.txt").read_text()
VOCABULARY = 288
OUTPUT = 24
LEAST_MARGIN = 1e-3  # between the two likeliest tokens, so that rounding cannot decide
MESSAGES = [
    {"role": "system", "content": "You read long documents."},
    {"role": "user", "content": "The river was wide, and the boat 12345 was small. Where is it?"},
]
DIGITS = {"qwen": r"\p{N}", "llama": r"\p{N}{1,3}", "glm": r"\p{N}{1,3}"}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    "glm": ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
}
TEMPLATES = {
    "qwen": (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "llama": (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "glm": (
        "[gMASK]<sop>{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
ENDS = {"qwen": "<|im_end|>", "llama": "<|eot_id|>", "glm": "<|endoftext|>"}
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
# name: tokenizer, class, its config, dtype, the largest file in bytes
CASES = {
    "qwen2_tied": ("qwen", "Qwen2", dict(tie_word_embeddings=True), "bfloat16", None),
    "qwen2_sharded": ("qwen", "Qwen2", dict(tie_word_embeddings=False), "bfloat16", 24_000),
    "qwen3_tied_sharded": ("qwen", "Qwen3", dict(tie_word_embeddings=True), "float32", 48_000),
    "qwen3": ("qwen", "Qwen3", dict(tie_word_embeddings=False), "float16", None),
    "llama3_tied": (
        "llama",
        "Llama",
        dict(
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        "bfloat16",
        None,
    ),
    "llama_sharded": ("llama", "Llama", dict(tie_word_embeddings=False), "bfloat16", 24_000),
    "glm": ("glm", "Glm", dict(tie_word_embeddings=False), "bfloat16", None),
    "glm_tied": ("glm", "Glm", dict(tie_word_embeddings=True), "bfloat16", None),
    "glm4_sharded": ("glm", "Glm4", dict(tie_word_embeddings=False), "bfloat16", 24_000),
}


def main() -> None:
    for name, case in CASES.items():
        folder = HERE / name
        expected = next(filter(None, (save(folder, seed, *case) for seed in itertools.count())))
        (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        print(name, sorted(file.name for file in folder.iterdir()), expected["tokens"])


def save(
    folder: pathlib.Path,
    seed: int,
    kind: str,
    cls: str,
    config: dict,
    dtype: str,
    largest: int | None,
) -> dict | None:
    """Writes a folder and returns what to expect of it; None where rounding could decide."""
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = make_tokenizer(kind)
    tokenizer.save_pretrained(folder)
    config_class = getattr(transformers, f"{cls}Config")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in {ENDS[kind], SPECIALS[kind][0]}]
    parsed = config_class(
        **SIZES | config, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends)
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{cls}ForCausalLM")(parsed)
    with torch.no_grad():
        for parameter in model.parameters():  # far enough apart that answers vary
            parameter += 0.3 * torch.randn(parameter.shape)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, **(dict(max_shard_size=largest) if largest else {})
    )
    return answer(folder)


def answer(folder: pathlib.Path) -> dict | None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    found = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=OUTPUT,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for logits in found.logits:
        first, second = logits[0].topk(2).values
        if first - second < LEAST_MARGIN:
            return None
    tokens = found.sequences[0, len(prompt) :].tolist()
    return {
        "messages": MESSAGES,
        "rendered": rendered,
        "prompt": prompt,
        "tokens": tokens,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
    }


def make_tokenizer(kind: str):
    """Returns a byte-level BPE of the family's kind, in the class that its checkpoints name."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN % DIGITS[kind]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY - len(SPECIALS[kind])
    core.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    specials = dict(eos_token=ENDS[kind], pad_token=SPECIALS[kind][0])
    if kind == "llama":
        specials["bos_token"] = "<|begin_of_text|>"
    if kind == "qwen":
        held = json.loads(core.to_str())["model"]
        merges = [tuple(merge) for merge in held["merges"]]
        tokenizer = transformers.Qwen2Tokenizer(vocab=held["vocab"], merges=merges, **specials)
    else:
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **specials)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[kind])})
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer


if __name__ == "__main__":
    main()
