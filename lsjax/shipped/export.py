"""Writes a shipped model as a Hugging Face folder."""

import json
import os
import pathlib
import tempfile
from typing import Any

from lsjax.checkpoint import export_parameters
from lsjax.shipped.model import END, END_TEXT, byte_tokenizer

_GENERATION_CONFIG = {"do_sample": False, "eos_token_id": END, "pad_token_id": END}
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_TEXT,
    "pad_token": END_TEXT,
    "clean_up_tokenization_spaces": False,
}


def export(hf_config: dict[str, Any], params: dict, folder: str | os.PathLike[str]) -> None:
    """Writes config.json, model.safetensors and the tokenizer.

    Args:
      hf_config: one of HF_CONFIGS.
      params: the model's parameters, as `train` returns them.
      folder: the folder to create.

    Raises:
      UserError: the folder already holds something.
    """
    with tempfile.TemporaryDirectory() as like:
        byte_tokenizer().save(os.path.join(like, "tokenizer.json"))
        for name, content in (
            ("generation_config.json", _GENERATION_CONFIG),
            ("tokenizer_config.json", _TOKENIZER_CONFIG),
        ):
            text = json.dumps(content, indent=2) + "\n"
            pathlib.Path(like, name).write_text(text, encoding="utf-8")
        export_parameters(params, hf_config, like, folder)
