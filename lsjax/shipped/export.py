"""Writing a shipped model as a Hugging Face folder."""

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import save

from lsjax.families import family_of, parse_config
from lsjax.nn.parameters import flatten
from lsjax.shipped.model import END, END_TEXT, byte_tokenizer

_GENERATION_CONFIG = {"do_sample": False, "eos_token_id": END, "pad_token_id": END}
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_TEXT,
    "pad_token": END_TEXT,
    "clean_up_tokenization_spaces": False,
}


def export(hf_config: dict[str, Any], params: dict, folder: pathlib.Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer into a folder that exists.

    Args:
      hf_config: one of HF_CONFIGS.
      params: its parameters, as `train` returns them.
      folder: where to.
    """
    config, flat = parse_config(hf_config), flatten(params)
    tensors = {
        tensor.name: np.concatenate([np.asarray(flat[path]) for path in tensor.params])
        for tensor in family_of(config).tensors(config)
    }
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", hf_config),
        ("generation_config.json", _GENERATION_CONFIG),
        ("tokenizer_config.json", _TOKENIZER_CONFIG),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
