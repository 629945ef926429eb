"""Reading the parameters of a Hugging Face folder."""

import dataclasses
from collections.abc import Sequence

import jax

from lsjax.checkpoint.hf_folder import stored_tensors
from lsjax.checkpoint.shards import read_rows
from lsjax.checkpoint.stored import Stored
from lsjax.checkpoint.tensors import abstract_tensor
from lsjax.config import ModelConfig
from lsjax.errors import UserError
from lsjax.families import Tensor, family_of
from lsjax.notes import note


@dataclasses.dataclass(frozen=True)
class HFCheckpoint:
    """The tensors of a Hugging Face folder that the model reads.

    Attributes:
      tensors: what each tensor holds, by its name.
      stored: where each tensor lies, by its name.
      unread: names of the tensors that nothing reads.
    """

    tensors: dict[str, Tensor]
    stored: dict[str, Stored]
    unread: tuple[str, ...]

    def dtypes(self) -> dict[str, jax.numpy.dtype]:
        """Parameter path -> the dtype that it is stored in."""
        return {
            path: stored.numpy_dtype
            for name, stored in self.stored.items()
            for path in self.tensors[name].params
        }

    def load(
        self, group: Sequence[Stored], abstract: dict[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """The parameters by path that some tensors of one file hold.

        They come in the dtypes and shardings asked for. Each process reads only the bytes of its
        own shards.
        """
        params: dict[str, jax.Array] = {}
        for item in group:
            first = 0
            for path in self.tensors[item.name].params:
                params[path] = read_rows(item, first, abstract[path])
                first += abstract[path].shape[0]
        return jax.block_until_ready(params)


def open_hf(
    folder: str, config: ModelConfig, abstract: dict[str, jax.ShapeDtypeStruct]
) -> HFCheckpoint:
    """Checks a Hugging Face folder against the model, from the headers of its files.

    Raises:
      UserError: whatever keeps it from being read, naming the file and the tensor.
    """
    found = stored_tensors(folder)
    tensors = {tensor.name: tensor for tensor in family_of(config).tensors(config)}
    embedding, head = vocabulary_tensors(config)
    if config.tie_embeddings and embedding not in found and head in found:
        tensors[head] = dataclasses.replace(tensors.pop(embedding), name=head)  # one of two names
    for name, tensor in tensors.items():
        if name not in found:
            raise UserError(
                f"{folder} lacks the tensor {name!r} of {config.architecture}; download the "
                "checkpoint again, or use the config.json that belongs to it."
            )
        found[name].check(abstract_tensor(tensor, abstract).shape)
    return HFCheckpoint(
        tensors,
        {name: stored for name, stored in found.items() if name in tensors},
        tuple(name for name in found if name not in tensors),
    )


def warn_unread(folder: str, names: tuple[str, ...]) -> None:
    """Names the tensors that are left out, in one warning."""
    if names:
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
        note(f"{folder}: not part of the model, left out: {shown}")


def vocabulary_tensors(config: ModelConfig) -> tuple[str, str]:
    """Names of the embedding and of the output head, which tied models store as one."""
    untied = family_of(config).tensors(dataclasses.replace(config, tie_embeddings=False))
    by_param = {tensor.params[0]: tensor.name for tensor in untied}
    return by_param["embed/weight"], by_param["lm_head/weight"]


def expendable(config: ModelConfig) -> set[str]:
    """Tensors that may stay unread without a word: buffers, and a tied head written out."""
    family = family_of(config)
    untied = dataclasses.replace(config, tie_embeddings=False)
    names = {tensor.name for tensor in family.tensors(untied)}
    return names.union(family.ignored) - {tensor.name for tensor in family.tensors(config)}
