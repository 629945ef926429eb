"""Reads the metadata of a GGUF file as typed values, with errors that name the key."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import GGUFValueType, ReaderField

from lsjax.runtime.errors import UserError

_MISSING = object()


class Metadata:
    """Reads the key-value pairs of a GGUF file one by one.

    Attributes:
      path: path of the file, for error messages.
      read: keys that were read or marked as known so far.
    """

    def __init__(self, path: str, fields: Mapping[str, ReaderField]):
        self.path = path
        self.read: set[str] = set()
        self._fields = fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def mark_known(self, *keys: str) -> None:
        """Marks keys as understood, although their values need no action here."""
        self.read.update(keys)

    def get(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """Returns the value of `key`, or `default` if the file does not have the key.

        Floats come as the shortest decimal that has their 32 bits, as config.json writes them.

        Raises:
          UserError: the key is absent and has no default, or its value is not of type `kind`.
        """
        self.read.add(key)
        if key not in self._fields:
            if default is _MISSING:
                raise UserError(f"{self.path} lacks {key}; use a file that is complete.")
            return default
        field = self._fields[key]
        try:
            value = field.contents()
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: {key} is not UTF-8 text; download it again.") from None
        if field.types[0] == GGUFValueType.FLOAT32:
            value = float(str(np.float32(value)))
        if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
            raise UserError(f"{self.path}: {key} must be a {kind.__name__}, not {value!r}.")
        return value

    def array(self, key: str, kind: type, default: Any = _MISSING) -> list:
        """Returns a list whose items are all of type `kind`, or `default`."""
        value = self.get(key, list, default)
        if not all(isinstance(item, kind) for item in value):
            raise UserError(
                f"{self.path}: {key} must be a list of {kind.__name__}; download it again."
            )
        return value

    def size(self, key: str, default: Any = _MISSING) -> int:
        """Returns an integer of at least 1, or `default`.

        A list with a value per layer is accepted if all of them are equal.
        """
        value = self.get(key, object, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise UserError(
                f"{self.path}: {key} differs from layer to layer, which is not supported; use a "
                "model whose layers are alike."
            )
        if not (type(value) is int and 1 <= value < 2**31):
            raise UserError(
                f"{self.path}: {key} must be a number from 1 to {2**31 - 1}, not {value!r}."
            )
        return value

    def expect(self, key: str, allowed: Any) -> None:
        """Refuses every value except `allowed`, the only one that is implemented."""
        value = self.get(key, object, allowed)
        if value != allowed:
            raise UserError(
                f"{self.path} says {key} = {value!r}; only {allowed!r} is supported here."
            )

    def refuse_unread(self, *prefixes: str) -> None:
        """Refuses the keys under these prefixes that nothing has read.

        Raises:
          UserError: names the keys.
        """
        if unread := sorted(k for k in self if k.startswith(prefixes) and k not in self.read):
            raise UserError(
                f"{self.path} sets {', '.join(unread)}, which may change what the model computes "
                "and is not supported; use the model's Hugging Face release."
            )
