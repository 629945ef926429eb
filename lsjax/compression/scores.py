"""Scores of query heads for KV head compression, in a small JSON file in the model folder."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from lsjax.config import ModelConfig
from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import write_atomically

HEAD_FILE = "retrieval_heads.json"


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """Scores of a model's query heads, from 0 to 1.

    Attributes:
      echo: [attention layers, heads] attention to earlier copies of the current token.
      induction: like `echo`, attention to the tokens that follow those copies.
    """

    echo: np.ndarray
    induction: np.ndarray


def write_scores(path: str, config: ModelConfig, scores: HeadScores) -> None:
    """Writes the file that `read_scores` reads."""
    _write(path, config, dataclasses.asdict(scores))


def read_scores(path: str, config: ModelConfig) -> HeadScores:
    """Reads the head scores of a model.

    Raises:
      UserError: the file is missing or damaged, or belongs to another model.
    """
    return HeadScores(*_read(path, config, ("echo", "induction")))


def write_bounds(path: str, config: ModelConfig, bounds: np.ndarray) -> None:
    """Writes the file that `read_bounds` reads."""
    _write(path, config, {"bound": bounds})


def read_bounds(path: str, config: ModelConfig) -> np.ndarray:
    """Reads [layers, heads] score bounds of a model with ALiBi; see `alibi_span.score_bounds`.

    Raises:
      UserError: the file is missing or damaged, or belongs to another model.
    """
    return _read(path, config, ("bound",))[0]


def _write(path: str, config: ModelConfig, rows: Mapping[str, np.ndarray]) -> None:
    """Writes a number for each layer and query head, under each name."""
    rounded = {name: [[round(float(x), 6) for x in y] for y in of] for name, of in rows.items()}
    write_atomically(path, json.dumps({"model": _shape(config), **rounded}) + "\n")


def _read(path: str, config: ModelConfig, names: Sequence[str]) -> list[np.ndarray]:
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        shape = found["model"]
        read = [np.asarray(found[name], np.float64) for name in names]
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; KV head compression needs to know how far heads look: run "
            f"scripts/find_retrieval_heads.py --model_path {os.path.dirname(path) or '.'} once."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a file of head scores ({type(error).__name__}: {error}); write it anew "
            "with scripts/find_retrieval_heads.py."
        ) from None
    if shape != _shape(config):
        raise UserError(
            f"{path} is of another model ({shape}), not of this one ({_shape(config)}); write it "
            "anew with scripts/find_retrieval_heads.py."
        )
    expected = len(config.attention_layers), config.num_heads
    for rows in read:
        if rows.shape != expected or not np.isfinite(rows).all():
            raise UserError(
                f"{path} does not hold a number for each of {expected[0]} layers of attention x "
                f"{expected[1]} heads; write it anew with scripts/find_retrieval_heads.py."
            )
    return read


def _shape(config: ModelConfig) -> dict[str, int]:
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size")
    return {name: getattr(config, name) for name in names}
