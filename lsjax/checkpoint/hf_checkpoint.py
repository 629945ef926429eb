"""Reads the parameters of a Hugging Face folder."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from lsjax.checkpoint.hf_folder import stored_tensors
from lsjax.checkpoint.shards import read_parts
from lsjax.checkpoint.tensor_info import StoredParameter, TensorInfo
from lsjax.config import ModelConfig
from lsjax.families import Tensor, family_of
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note


@dataclasses.dataclass(frozen=True)
class HFCheckpoint:
    """The parameters in a Hugging Face folder that the model reads.

    Attributes:
      stored: parameter path -> where it is stored; in the order of the files.
      unread: names of the tensors that the model does not read.
    """

    stored: dict[str, StoredParameter]
    unread: tuple[str, ...]

    def dtypes(self) -> dict[str, jax.numpy.dtype]:
        """Returns the stored dtype of each parameter, by path."""
        return {path: stored.numpy_dtype for path, stored in self.stored.items()}

    def load(
        self, group: Sequence[StoredParameter], abstract: dict[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Loads a group of parameters, by path, in the dtypes and shardings of `abstract`.

        Each process reads only the bytes of its own shards.
        """
        params = {item.name: read_parts(item.parts, abstract[item.name]) for item in group}
        return jax.block_until_ready(params)


def open_hf(
    folder: str, config: ModelConfig, abstract: dict[str, jax.ShapeDtypeStruct]
) -> HFCheckpoint:
    """Checks a Hugging Face folder against the model, reading only the headers of its files.

    Raises:
      UserError: the folder does not fit the model; names the file and the tensor.
    """
    found = _unstacked(stored_tensors(folder), config)
    tensors = {tensor.name: tensor for tensor in family_of(config).tensors(config)}
    embedding, head = vocabulary_tensors(config)
    if config.tie_embeddings and embedding not in found and head in found:
        # A tied model may store its one tensor under either name.
        tensors[head] = dataclasses.replace(tensors.pop(embedding), name=head)
    for name, tensor in tensors.items():
        if name not in found:
            raise UserError(
                f"{folder} lacks the tensor {name!r} of {config.architecture}; download the "
                "checkpoint again, or use the config.json that belongs to it."
            )
        found[name].check(abstract_tensor(tensor, abstract))
    parts: dict[str, dict[int, TensorInfo]] = {}
    for name, stored in found.items():
        offset, tensor = stored.offset, tensors.get(name)
        for path in tensor.params if tensor else ():
            shape = part_shape(tensor, abstract[path])
            nbytes = math.prod(shape) * stored.numpy_dtype.itemsize
            part = dataclasses.replace(stored, shape=shape, nbytes=nbytes, offset=offset)
            parts.setdefault(path, {})[tensor.index or 0] = part
            offset += nbytes
    return HFCheckpoint(
        {
            path: StoredParameter(path, tuple(of[i] for i in range(len(of))))
            for path, of in parts.items()
        },
        tuple(name for name in found if name not in tensors),
    )


def _unstacked(found: dict[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """Returns the stored tensors, with those in the place of each that stacks them."""
    stacked, wanted = family_of(config).stacked, {t.name for t in family_of(config).tensors(config)}
    parts: dict[str, TensorInfo] = {}
    for name, stored in found.items():
        end = next((end for end in stacked if name.endswith(end)), None)
        ends = stacked.get(end, ())
        if end is None or len(stored.shape) != 3 or stored.shape[1] % len(ends):
            parts[name] = stored
            continue
        count = stored.shape[0] * len(ends)
        shape, nbytes = (stored.shape[1] // len(ends), stored.shape[2]), stored.nbytes // count
        for i in range(count):
            part = name.removesuffix(end) + ends[i % len(ends)].format(i // len(ends))
            if part not in wanted:
                raise UserError(
                    f"{stored.path}: {name!r} has the shape {list(stored.shape)}, but config.json "
                    f"has no {part!r}; the two files are not of one model."
                )
            offset = stored.offset + i * nbytes
            parts[part] = dataclasses.replace(
                stored, name=part, shape=shape, nbytes=nbytes, offset=offset
            )
    return parts


def warn_unused(folder: str, names: tuple[str, ...]) -> None:
    """Warns once, naming the tensors that are not part of the model."""
    if names:
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
        note(f"{folder}: not part of the model, left out: {shown}")


def vocabulary_tensors(config: ModelConfig) -> tuple[str, str]:
    """Returns the tensor names of the embedding and the head; tied models may store just one."""
    untied = family_of(config).tensors(dataclasses.replace(config, tie_embeddings=False))
    by_param = {tensor.params[0]: tensor.name for tensor in untied}
    return by_param["embed/weight"], by_param["lm_head/weight"]


def without_ignorable(config: ModelConfig, unread: Sequence[str]) -> tuple[str, ...]:
    """Returns the unread tensors without those that need no warning; see Family.ignored.

    The head of a tied model needs none, either.
    """
    ignored, vocabulary = family_of(config).ignored, vocabulary_tensors(config)
    return tuple(x for x in unread if x not in vocabulary and not x.startswith(ignored))


def abstract_tensor(
    tensor: Tensor, abstract: dict[str, jax.ShapeDtypeStruct]
) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a tensor, from those of the parameters that it holds."""
    shapes = [part_shape(tensor, abstract[path]) for path in tensor.params]
    rows = sum(shape[0] for shape in shapes)
    return jax.ShapeDtypeStruct((rows, *shapes[0][1:]), abstract[tensor.params[0]].dtype)


def part_shape(tensor: Tensor, param: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Returns the shape of what a tensor holds of one of its parameters."""
    return param.shape if tensor.index is None else param.shape[1:]
