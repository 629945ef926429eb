"""The shape of the shipped models, and their tokens."""

from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from lsjax.shipped.passages import Passage

TRAINED_LENGTH = 512
END = 256  # the token after the last byte
END_TEXT = "<|endoftext|>"
ANSWER_TOKENS = 7  # a space, five digits and the end

_SHAPE: dict[str, Any] = {
    "vocab_size": 264,  # 256 bytes, the end, and padding to a number that meshes divide
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "eos_token_id": END,
    "torch_dtype": "float32",
}
# How tokens know their places -> config.json.
HF_CONFIGS: dict[str, dict[str, Any]] = {
    "rotary": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_SHAPE,
        "num_key_value_heads": 2,
        "max_position_embeddings": TRAINED_LENGTH,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
    },
    "alibi": {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        **_SHAPE,
        "model_max_length": TRAINED_LENGTH,
        "tie_word_embeddings": False,
    },
}


def tokens_of(passage: Passage) -> np.ndarray:
    """Prompt, answer and end as [length] int32; the last ANSWER_TOKENS are the answer's."""
    return np.array([*f"{passage.prompt} {passage.answer}".encode(), END], np.int32)


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are the bytes of UTF-8, with the end after them."""
    # Byte-level tokenizers write a byte that does not print as the next free character.
    letters = sorted(ByteLevel.alphabet())
    printed = [b for b in range(256) if chr(b) in letters]
    others = [b for b in range(256) if chr(b) not in letters]
    names = {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={names[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_TEXT])
    return tokenizer
