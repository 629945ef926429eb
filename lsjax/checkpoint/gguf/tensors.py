"""Finds the parameters of a model in the tensors of a GGUF file and dequantizes them.

Source: gguf.constants.TENSOR_NAMES for the names; LlamaModel.permute in llama.cpp's
conversion/llama.py for the order of rows.
"""

import dataclasses
from collections.abc import Callable, Iterator

import gguf
import jax
import numpy as np

from lsjax.checkpoint.gguf.config import architecture_of
from lsjax.checkpoint.gguf.file import GGUFFile
from lsjax.checkpoint.gguf.rope import ROPE_FREQS
from lsjax.config import ModelConfig
from lsjax.families import family_of
from lsjax.runtime.errors import UserError

_OUTER = {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"}
_INNER = {
    "attn_norm": "attn_norm",
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "attn/q_norm": "attn_q_norm",
    "attn/k_norm": "attn_k_norm",
    "post_attn_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "post_mlp_norm": "post_ffw_norm",
}
# Rows are dequantized in blocks of this many bytes of float32.
_BLOCK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a GGUF tensor that are a parameter, in the parameter's order."""

    tensor: gguf.ReaderTensor
    rows: np.ndarray

    @property
    def nbytes(self) -> int:
        """Size in bytes, as stored."""
        return self._row_bytes * len(self.rows)

    @property
    def _row_bytes(self) -> int:
        return self.tensor.n_bytes // int(self.tensor.shape[-1])

    def read(
        self, dtype: np.dtype, progress: Callable[[int], None] | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the parameter in blocks along its first axis.

        Args:
          dtype: dtype of the blocks; values are rounded to the nearest.
          progress: called with the number of stored bytes read since the last call.
        """
        tensor = self.tensor
        row_elements = tensor.n_elements // int(tensor.shape[-1])
        at_once = max(1, _BLOCK_BYTES // (4 * row_elements))
        for start in range(0, len(self.rows), at_once):
            rows = self.rows[start : start + at_once]
            if tensor.data.ndim == 1:  # its bytes are no rows
                values = gguf.dequantize(tensor.data, tensor.tensor_type)[rows]
            else:
                values = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
            yield values.astype(dtype)
            if progress is not None:
                progress(self._row_bytes * len(rows))


def find_parameters(
    file: GGUFFile, config: ModelConfig, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, Rows]:
    """Returns parameter path -> where it is in the file.

    Raises:
      UserError: a tensor is missing, not known, has another shape, or is of a type that cannot be
        dequantized; names it.
    """
    wanted: dict[str, list[str]] = {}
    for tensor in family_of(config).tensors(config):
        for path in tensor.params:  # gate before up
            wanted.setdefault(_tensor_name(path, config), []).append(path)
    if missing := [name for name in wanted if name not in file.tensors]:
        raise UserError(
            f"{file.path} lacks the tensor {missing[0]!r} of {config.architecture}; download it "
            "again, or use the model's Hugging Face release."
        )
    if unknown := [name for name in file.tensors if name not in {*wanted, ROPE_FREQS}]:
        raise UserError(
            f"{file.path} holds the tensor {unknown[0]!r}, which {config.architecture} does not "
            "have; use the model's Hugging Face release."
        )
    _check_types(file)
    found: dict[str, Rows] = {}
    for name, paths in wanted.items():
        tensor = file.tensors[name]
        shapes = [abstract[path].shape for path in paths]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        if (stored := tuple(int(n) for n in reversed(tensor.shape))) != shape:
            raise UserError(
                f"{file.path}: {name!r} has the shape {list(stored)}, but its metadata ask for "
                f"{list(shape)}; download it again."
            )
        ends = np.cumsum([s[0] for s in shapes])
        for path, size, end in zip(paths, (s[0] for s in shapes), ends, strict=True):
            found[path] = Rows(tensor, np.arange(end - size, end))
    if architecture_of(file).permuted:
        for path, rows in found.items():
            if heads := _rotated_heads(path, config):
                found[path] = Rows(rows.tensor, _in_halves(rows.rows, heads))
    return found


def _tensor_name(path: str, config: ModelConfig) -> str:
    """Returns the name of the GGUF tensor that holds a parameter."""
    module, _, kind = path.rpartition("/")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    layer, _, module = module.partition("/")
    name = _INNER[module]
    if name == "ffn_gate" and config.architecture == "Glm4ForCausalLM":
        name = "ffn_up"  # it holds gate and up, in the order of the parameters
    return f"blk.{layer.removeprefix('layers_')}.{name}.{kind}"


def _rotated_heads(path: str, config: ModelConfig) -> int:
    """Returns the number of heads whose channels a projection's rows are; 0 if none rotates."""
    module = path.rpartition("/")[0]
    if module.endswith("attn/q"):
        return config.num_heads
    return config.num_kv_heads if module.endswith("attn/k") else 0


def _in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from adjacent pairs (2i, 2i+1) to halves (i, i + size/2)."""
    return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _check_types(file: GGUFFile) -> None:
    types = {tensor.tensor_type: tensor for tensor in file.tensors.values()}
    for kind, tensor in types.items():
        try:
            gguf.dequantize(tensor.data[:1] if tensor.data.ndim > 1 else tensor.data, kind)
        except NotImplementedError:
            raise UserError(
                f"{file.path}: {tensor.name!r} is of the type {kind.name}, which cannot be "
                "dequantized; use a file of another quantization."
            ) from None
