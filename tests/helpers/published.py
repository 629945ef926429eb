"""Published models' configurations, and the same models with fewer layers."""

import dataclasses
import pathlib

from lsjax.config import ModelConfig
from lsjax.families import read_config

CONFIGS = pathlib.Path(__file__).parents[1] / "golden" / "configs"
QWEN = pathlib.Path(__file__).parents[2] / "examples" / "qwen2.5-0.5b.json"
GLM = CONFIGS / "glm-4-9b-chat-1m.json"


def with_layers(path: pathlib.Path, count: int) -> ModelConfig:
    """The model with its first layers alone."""
    config = read_config(path)
    return dataclasses.replace(config, layers=config.layers[:count])
