"""Reading config.json: typed fields, and errors that name the field."""

import re
from collections.abc import Mapping
from typing import Any

from lsjax.config import DTYPES
from lsjax.errors import UserError
from lsjax.generation_config import eos_token_ids
from lsjax.notes import note
from lsjax.positions.scaling import is_positive

_MISSING = object()
# What files hold that says nothing about the numbers a model computes: where it comes from, how
# it was trained, and which of its library's code paths runs.
_OF_NO_EFFECT = {
    # Of every model: which outputs a Python call returns, heads for other tasks, encoders.
    "add_cross_attention", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "is_decoder", "is_encoder_decoder", "output_attentions",
    "output_hidden_states", "output_scores", "prefix", "problem_type", "pruned_heads",
    "remove_invalid_values", "return_dict", "return_dict_in_generate", "sep_token_id",
    "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "torchscript",
    "use_bfloat16",
    # How to generate, which transformers reads from generation_config.json alone.
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "repetition_penalty",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    # Of one model or another.
    "_attn_implementation", "_from_model_config", "_name_or_path",
    "apply_query_key_layer_scaling", "architectures", "attention_dropout",
    "attention_softmax_in_fp32", "attn_implementation", "auto_map", "bias_dropout_fusion",
    "bos_token_id", "classifier_dropout", "dtype", "finetuning_task", "fp32_residual_connection",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "label2id",
    "model_type", "pad_token_id", "pretraining_tp", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_DECISIVE = re.compile("rope_|.*_attention_config$")


class Fields:
    """The object in config.json, read field by field.

    Attributes:
      raw: the object.
      read: names asked for so far.
    """

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.read: set[str] = set()

    def having(self, **values: Any) -> "Fields":
        """The same with other values; reading it counts as reading this."""
        other = Fields({**self.raw, **values})
        other.read = self.read
        return other

    def raw_value(self, name: str, default: Any = None) -> Any:
        """What the file holds, unchecked."""
        self.read.add(name)
        return self.raw.get(name, default)

    def know(self, *names: str) -> None:
        """Says that fields are understood, though nothing has to be done for them here."""
        self.read.update(names)

    def settle_unread(self) -> None:
        """Decides on what the file sets and no part of the family has asked for: it is refused
        where it would change positions or attention, and else named in a note.

        Raises:
          UserError: naming the fields.
        """
        given = {name for name, value in self.raw.items() if value not in (None, {})}
        unread = sorted(given - self.read - _OF_NO_EFFECT)
        if decisive := [name for name in unread if _DECISIVE.match(name)]:
            raise UserError(
                f"config.json sets {', '.join(decisive)}, which would change positions or "
                "attention and is not supported; use a model without it."
            )
        if unread:
            note(f"config.json sets {', '.join(unread)}, which nothing here reads.")

    def exact_length(self) -> int | None:
        """Tokens that a request may have while attention is as it is computed here; None for any.

        Dual chunk attention changes nothing up to chunk_size. Sparse attention is an approximation
        of what is computed here.
        """
        self.know("sparse_attention_config")
        block = self.get("dual_chunk_attention_config", dict, None)
        sparse = self.raw.get("sparse_attention_config") or (block or {}).get(
            "sparse_attention_config"
        )
        if sparse:
            note("config.json's sparse_attention_config is not used: every key is attended to.")
        return None if block is None else Fields(block).size("chunk_size")

    def get(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """The field `name`, or `default` where it is absent or null; a float is above 0.

        Raises:
          UserError: no such field and no default, or a value that is not of `kind`.
        """
        value = self.raw_value(name)
        if value is None:
            if default is _MISSING:
                raise UserError(f"config.json lacks the field {name!r}, which this family needs.")
            return default
        if kind is float:
            if not is_positive(value):
                raise UserError(
                    f"config.json field {name!r} must be a number above 0 (and at most 1e12), "
                    f"not {value!r}."
                )
            return float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise UserError(f"config.json field {name!r} must be a {kind.__name__}, not {value!r}.")
        return value

    def size(self, name: str, default: Any = _MISSING) -> Any:
        """A whole number from 1 to 2^31 - 1, or `default`."""
        value = self.get(name, int, default)
        if value is not default and not 1 <= value < 2**31:
            raise UserError(
                f"config.json field {name!r} must be a number from 1 to {2**31 - 1}, not {value}."
            )
        return value

    def expect(self, name: str, allowed: Any, default: Any) -> None:
        """Refuses a setting that the family's code does not implement."""
        value = self.raw_value(name, default)
        if value != allowed:
            raise UserError(
                f"config.json says {name} = {value!r}; only {allowed!r} is supported here."
            )

    def eos_token_ids(self) -> tuple[int, ...]:
        self.know("eos_token_id")
        return eos_token_ids(self.raw, "config.json")

    def dtype(self) -> str:
        value = self.get("dtype", str, None) or self.get("torch_dtype", str, "float32")
        if value not in DTYPES:
            raise UserError(
                f"config.json says the weights are {value!r}; supported are {', '.join(DTYPES)}."
            )
        return value

    def rope_block(self) -> Mapping[str, Any] | None:
        """`rope_parameters` (transformers 5) or `rope_scaling` (transformers 4), or both as one.

        Raises:
          UserError: the two contradict each other.
        """
        new, old = self.raw_value("rope_parameters"), self.raw_value("rope_scaling")
        if not (isinstance(new, Mapping) and isinstance(old, Mapping) and new and old):
            return new or old
        blocks = [dict(old), dict(new)]
        # A block that says no kind, or the default one, leaves it to the other.
        kinds = [block.pop("rope_type", block.pop("type", None)) for block in blocks]
        for block in blocks:
            block.pop("type", None)
        said = [kind for kind in kinds if kind not in (None, "default")]
        for name in blocks[0].keys() & blocks[1].keys():
            if blocks[0][name] != blocks[1][name]:
                raise UserError(_contradiction(name, blocks[0][name], blocks[1][name]))
        if len(said) == 2 and said[0] != said[1]:
            raise UserError(_contradiction("rope_type", *said))
        return blocks[0] | blocks[1] | {"rope_type": said[0] if said else "default"}

    def rope(self, name: str, default: float) -> float:
        """A rope field that transformers 5 keeps in the block and 4 beside it."""
        self.know(name)
        block = self.rope_block()
        if isinstance(block, Mapping) and block.get(name) is not None:
            value = Fields(block).get(name, float)
            if self.get(name, float, value) != value:
                raise UserError(
                    f"config.json says {name} = {self.raw[name]!r}, but its rope block says "
                    f"{value!r}; leave one of them out."
                )
            return value
        return self.get(name, float, default)


def _contradiction(name: str, old: Any, new: Any) -> str:
    return (
        f"config.json's rope_scaling says {name} = {old!r}, but its rope_parameters say {new!r}; "
        "leave one of the two out."
    )
