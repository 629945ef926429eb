"""The small models that ship with the library, and the recipe that trains them."""

import pathlib

_FOLDERS = {"rotary": "passkey", "alibi": "passkey_alibi"}


def shipped_model_path(positions: str = "rotary") -> pathlib.Path:
    """Returns the folder of a shipped model, which finds a pass key in a long text.

    Args:
      positions: "rotary", or "alibi" for its twin, trained the same way with ALiBi.
    """
    return pathlib.Path(__file__).parent / _FOLDERS[positions]
