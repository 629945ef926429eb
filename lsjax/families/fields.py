"""Reading config.json: typed fields, and errors that name the field."""

import logging
from collections.abc import Mapping
from typing import Any

from lsjax.config import DTYPES
from lsjax.errors import UserError
from lsjax.positions.scaling import is_positive

_MISSING = object()
# What files hold that says nothing about the numbers a model computes: where it comes from, how
# it was trained, and which of its library's code paths runs.
_OF_NO_EFFECT = {
    "_attn_implementation", "_from_model_config", "_name_or_path",
    "apply_query_key_layer_scaling", "architectures", "attention_dropout",
    "attention_softmax_in_fp32", "attn_implementation", "auto_map", "bias_dropout_fusion",
    "bos_token_id", "classifier_dropout", "dtype", "finetuning_task", "fp32_residual_connection",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "label2id",
    "model_type", "pad_token_id", "pretraining_tp", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


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

    def warn_of_unread(self) -> None:
        """Lists in a warning what the file sets and no part of the family has asked for."""
        given = {name for name, value in self.raw.items() if value is not None}
        if unread := sorted(given - self.read - _OF_NO_EFFECT):
            logging.getLogger("lsjax").warning(
                "config.json sets %s, which nothing here reads: ignored.", ", ".join(unread)
            )

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
        value = self.raw_value("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise UserError(
                f"config.json field 'eos_token_id' must be a token id or a list of them, "
                f"not {value!r}."
            )
        return tuple(ids)

    def dtype(self) -> str:
        value = self.get("dtype", str, None) or self.get("torch_dtype", str, "float32")
        if value not in DTYPES:
            raise UserError(
                f"config.json says the weights are {value!r}; supported are {', '.join(DTYPES)}."
            )
        return value

    def rope_block(self) -> Mapping[str, Any] | None:
        """`rope_parameters` (transformers 5) or `rope_scaling` (transformers 4)."""
        return self.raw_value("rope_parameters") or self.raw_value("rope_scaling")

    def rope(self, name: str, default: float) -> float:
        """A rope field that transformers 5 keeps in the block and 4 beside it."""
        self.know(name)
        block = self.rope_block()
        if isinstance(block, Mapping) and block.get(name) is not None:
            return Fields(block).get(name, float)
        return self.get(name, float, default)
