"""Reads config.json as typed fields, with errors that name the field."""

import re
from collections.abc import Mapping
from typing import Any

from lsjax.config import DTYPES
from lsjax.families.generation_config import eos_token_ids
from lsjax.positions.scaling import is_positive
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note

_MISSING = object()
# Fields that do not affect the numbers a model computes: they describe where it comes from, how it
# was trained, and which code paths of its library run.
_OF_NO_EFFECT = {
    # Common to all models: outputs that a Python call returns, heads for other tasks, encoders.
    "add_cross_attention", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "is_decoder", "is_encoder_decoder", "output_attentions",
    "output_hidden_states", "output_scores", "prefix", "problem_type", "pruned_heads",
    "remove_invalid_values", "return_dict", "return_dict_in_generate", "sep_token_id",
    "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "torchscript",
    "use_bfloat16",
    # Generation settings, which transformers reads only from generation_config.json.
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "repetition_penalty",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    # Found in some models.
    "_attn_implementation", "_from_model_config", "_name_or_path",
    "apply_query_key_layer_scaling", "architectures", "attention_dropout",
    "attention_softmax_in_fp32", "attn_implementation", "auto_map", "bias_dropout_fusion",
    "bos_token_id", "classifier_dropout", "dtype", "finetuning_task", "fp32_residual_connection",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "label2id",
    "model_type", "pad_token_id", "pretraining_tp", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_REFUSED_IF_UNREAD = re.compile("rope_|.*_attention_config$")


class Fields:
    """Reads the JSON object of a config.json field by field.

    Attributes:
      raw: the JSON object.
      read: names of the fields that were read or marked as known so far.
    """

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.read: set[str] = set()

    def with_overrides(self, **values: Any) -> "Fields":
        """Returns a copy with other values; fields read from the copy count as read here."""
        other = Fields({**self.raw, **values})
        other.read = self.read
        return other

    def raw_value(self, name: str, default: Any = None) -> Any:
        """Returns a field's value as it is in the file, unchecked."""
        self.read.add(name)
        return self.raw.get(name, default)

    def mark_known(self, *names: str) -> None:
        """Marks fields as understood, although their values need no action here."""
        self.read.update(names)

    def warn_unused(self) -> None:
        """Refuses or notes the fields that the file sets and the family has not read.

        Fields that would change positions or attention are refused. Others are named in a note.

        Raises:
          UserError: names the refused fields.
        """
        given = {name for name, value in self.raw.items() if value not in (None, {})}
        unread = sorted(given - self.read - _OF_NO_EFFECT)
        if decisive := [name for name in unread if _REFUSED_IF_UNREAD.match(name)]:
            raise UserError(
                f"config.json sets {', '.join(decisive)}, which would change positions or "
                "attention and is not supported; use a model without it."
            )
        if unread:
            note(f"config.json sets {', '.join(unread)}, which nothing here reads.")

    def dual_chunk(self) -> Mapping[str, Any] | None:
        """Returns the block that switches dual chunk attention on, or None.

        Sparse attention approximates the full attention that is computed here.
        """
        self.mark_known("sparse_attention_config")
        block = dict(self.get("dual_chunk_attention_config", dict, {}))
        nested = block.pop("sparse_attention_config", None)
        if nested or self.raw.get("sparse_attention_config"):
            note("config.json's sparse_attention_config is not used: every key is attended to.")
        return block or None

    def get(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """Returns the field `name`, or `default` if it is absent or null.

        Raises:
          UserError: the field is absent and has no default, its value is not of type `kind`, or a
            float is not above 0 (and at most 1e12).
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
        """Returns an integer field from 1 to 2^31 - 1, or `default`."""
        value = self.get(name, int, default)
        if value is not default and not 1 <= value < 2**31:
            raise UserError(
                f"config.json field {name!r} must be a number from 1 to {2**31 - 1}, not {value}."
            )
        return value

    def expect(self, name: str, allowed: Any, default: Any) -> None:
        """Refuses every value except `allowed`, the only one that the family implements."""
        value = self.raw_value(name, default)
        if value != allowed:
            raise UserError(
                f"config.json says {name} = {value!r}; only {allowed!r} is supported here."
            )

    def eos_token_ids(self) -> tuple[int, ...]:
        self.mark_known("eos_token_id")
        return eos_token_ids(self.raw, "config.json")

    def dtype(self) -> str:
        value = self.get("dtype", str, None) or self.get("torch_dtype", str, "float32")
        if value not in DTYPES:
            raise UserError(
                f"config.json says the weights are {value!r}; supported are {', '.join(DTYPES)}."
            )
        return value

    def rope_block(self) -> Mapping[str, Any] | None:
        """Returns `rope_parameters` (transformers 5) or `rope_scaling` (transformers 4).

        If the file has both, they are merged.

        Raises:
          UserError: the two contradict each other.
        """
        new, old = self.raw_value("rope_parameters"), self.raw_value("rope_scaling")
        if not (isinstance(new, Mapping) and isinstance(old, Mapping) and new and old):
            return new or old
        blocks = [dict(old), dict(new)]
        # A block without a kind, or of the default kind, takes the kind of the other block.
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
        """Returns a field that transformers 5 keeps in the rope block and 4 beside it."""
        self.mark_known(name)
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
