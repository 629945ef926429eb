"""Long-sequence language models in JAX and Flax.

Example:

    lm = lsjax.load("/models/Qwen2.5-7B-Instruct", kv_cache_dtype="int8")
    print(lm.generate("Once upon a time", max_output_length=64)[0].text)
"""

from lsjax.config import ModelConfig, RopeScaling
from lsjax.families import read_config
from lsjax.inference.completion import Completion, Stats
from lsjax.inference.sampling import Sampling
from lsjax.language_model import LanguageModel, load
from lsjax.planning import Plan, plan
from lsjax.runtime.errors import UserError
from lsjax.shipped import shipped_model_path

__all__ = [
    "Completion",
    "LanguageModel",
    "ModelConfig",
    "Plan",
    "RopeScaling",
    "Sampling",
    "Stats",
    "UserError",
    "load",
    "plan",
    "read_config",
    "shipped_model_path",
]
