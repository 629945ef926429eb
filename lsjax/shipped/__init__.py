"""The small models that come with the library, and what made them."""

import pathlib

_FOLDERS = {"rotary": "passkey", "alibi": "passkey_alibi"}


def shipped_model_path(positions: str = "rotary") -> pathlib.Path:
    """The folder of a shipped model: it finds a pass key in a long text.

    Args:
      positions: "rotary", or "alibi" for the twin that was trained the same way with ALiBi.
    """
    return pathlib.Path(__file__).parent / _FOLDERS[positions]
