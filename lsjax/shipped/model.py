"""The configurations of the shipped models, and their tokens."""

from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from lsjax.evals.passkey import Passage, statement
from lsjax.training.documents import Document

TRAINED_LENGTH = 512
END = 256  # id of the end token, after the 256 bytes
END_TEXT = "<|endoftext|>"
ANSWER_TOKENS = 7  # a space, five digits and the end token

_SHAPE: dict[str, Any] = {
    "vocab_size": 264,  # 256 bytes, the end token, and padding for meshes to divide
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "eos_token_id": END,
    "torch_dtype": "float32",
}
# Position encoding -> config.json.
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
    """Returns [length] int32 ids: the prompt, then ANSWER_TOKENS ids of the answer and its end."""
    return np.array([*f"{passage.prompt} {passage.answer}".encode(), END], np.int32)


def byte_tokenizer() -> Tokenizer:
    """Makes a tokenizer whose ids are the UTF-8 bytes, followed by the end token."""
    # Byte-level tokenizers write an unprintable byte as the next free character from 256 on.
    letters = sorted(ByteLevel.alphabet())
    printed = [b for b in range(256) if chr(b) in letters]
    others = [b for b in range(256) if chr(b) not in letters]
    names = {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={names[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_TEXT])
    return tokenizer


def weighted(passage: Passage, answer_weight: float, other_weight: float) -> Document:
    """Makes a training document of a passage, its answer and the end token.

    Args:
      passage: the passage, which may state its key several times.
      answer_weight: weight of the answer's digits, the end token and the digits of each repeated
        key.
      other_weight: weight of all other tokens.
    """
    text, told = f"{passage.prompt} {passage.answer}", statement(passage.answer)
    ids = tokens_of(passage)
    weights = np.full(len(ids), other_weight, np.float32)
    at = text.find(told)
    while (at := text.find(told, at + 1)) >= 0:
        digits = at + told.index(passage.answer)
        weights[digits : digits + len(passage.answer)] = answer_weight
    weights[-len(passage.answer) - 1 :] = answer_weight
    return Document(ids, weights)
