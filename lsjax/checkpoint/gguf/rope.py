"""Reads the RoPE scaling of a GGUF file as config.json's `rope_scaling`.

llama.cpp has no kind llama3: it stores what each frequency is divided by as the tensor rope_freqs.
Source: LlamaModel.generate_extra_tensors in llama.cpp's conversion/llama.py.
"""

import math
from typing import Any

import gguf
import numpy as np

from lsjax.checkpoint.gguf.file import GGUFFile
from lsjax.runtime.errors import UserError

ROPE_FREQS = "rope_freqs.weight"
# The divisors depend on ratios to this length alone, and llama.cpp always computes with it.
_LLAMA3_LENGTH = 8192
_LLAMA3_PUBLISHED = (1.0, 4.0)
# Divisors are computed in float32, from powers of rope_theta in float32.
_TOLERANCE = 1e-4


def rope_scaling(file: GGUFFile, prefix: str, head_dim: int, length: int) -> dict[str, Any] | None:
    """Returns config.json's `rope_scaling`, None for no scaling.

    Args:
      file: GGUF file.
      prefix: its architecture and a dot.
      head_dim: number of channels of a head.
      length: its context length in tokens.

    Raises:
      UserError: config.json has nothing that does the same.
    """
    metadata, prefix = file.metadata, prefix + "rope.scaling."
    metadata.mark_known(prefix + "finetuned")  # says that the model was trained with the scaling
    factor = metadata.get(prefix + "factor", float, 1.0)
    # llama.cpp takes a factor without a type as linear.
    kind = metadata.get(prefix + "type", str, "none" if factor in (0.0, 1.0) else "linear")
    original = metadata.size(prefix + "original_context_length", length)
    if kind not in ("none", "linear", "yarn"):
        raise UserError(
            f"{file.path} has a RoPE scaling of kind {kind!r}, which is not supported in GGUF "
            "files; supported are linear, yarn and llama3, so use the model's Hugging Face release."
        )
    divisors = _divisors(file)
    if divisors is not None:
        if kind != "none":
            raise UserError(
                f"{file.path} has both {ROPE_FREQS} and a RoPE scaling of kind {kind!r}, which "
                "config.json cannot express; use the model's Hugging Face release."
            )
        theta = metadata.get(prefix.removesuffix("scaling.") + "freq_base", float, 10000.0)
        return _llama3(file, divisors, theta, head_dim)
    if kind == "none":
        return None
    block: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        block["original_max_position_embeddings"] = original
        metadata.expect(prefix + "yarn_ext_factor", 1.0)
        for name in ("attn_factor", "yarn_attn_factor"):
            metadata.expect(prefix + name, 1.0)
        for name in ("beta_fast", "beta_slow"):
            if prefix + "yarn_" + name in metadata:
                block[name] = metadata.get(prefix + "yarn_" + name, float)
    return block


def _divisors(file: GGUFFile) -> np.ndarray | None:
    """Returns what each rotary frequency is divided by [head_dim / 2], None if not stored."""
    if ROPE_FREQS not in file.tensors:
        return None
    tensor = file.tensors[ROPE_FREQS]
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


def _llama3(file: GGUFFile, divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Finds the parameters of llama3 that give these divisors.

    Raises:
      UserError: no parameters do.
    """
    cycles = _LLAMA3_LENGTH / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    factor = float(f"{divisors.max():.6g}") if divisors.size else 1.0
    if divisors.shape == cycles.shape and factor > 1:
        for low, high in (_LLAMA3_PUBLISHED, *_fitted(cycles, divisors, factor)):
            smooth = np.clip((cycles - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=_TOLERANCE):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": _LLAMA3_LENGTH,
                }
    raise UserError(
        f"{file.path}: no parameters of llama3 give its {ROPE_FREQS}, so config.json cannot "
        "express it; use the model's Hugging Face release."
    )


def _fitted(cycles: np.ndarray, divisors: np.ndarray, factor: float) -> list[tuple[float, float]]:
    """Fits (low_freq_factor, high_freq_factor) to the divisors between 1 and the factor.

    There, the share of the unscaled frequency is linear in the cycles that fit into the length.
    """
    between = (divisors > 1 + _TOLERANCE) & (divisors < factor * (1 - _TOLERANCE))
    if between.sum() < 2:
        return []
    share = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(cycles[between], share, 1)
    low, high = (float(f"{x:.4g}") for x in (-start / slope, (1 - start) / slope))
    return [(low, high)] if 0 < low < high else []
