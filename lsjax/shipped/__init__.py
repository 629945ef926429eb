"""The small model that comes with the library, and what made it."""

import pathlib


def shipped_model_path() -> pathlib.Path:
    """The folder of the shipped model: it finds a pass key in a long text."""
    return pathlib.Path(__file__).parent / "passkey"
