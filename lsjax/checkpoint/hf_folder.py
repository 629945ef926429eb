"""Finds the tensors in a Hugging Face folder and the files that hold them."""

import os

from lsjax.checkpoint.safetensors_header import read_header, read_metadata
from lsjax.checkpoint.tensor_info import TensorInfo
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note
from lsjax.runtime.text_files import read_json

SUFFIX = ".safetensors"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")


def stored_tensors(folder: str) -> dict[str, TensorInfo]:
    """Returns the tensors of all safetensors files by name, reading only the file headers.

    If the folder has an index, the index says which tensors there are. A model.safetensors that the
    index does not name is read instead of the indexed files, as in transformers.

    Raises:
      UserError: there are no safetensors files, one is missing or corrupt, or two files hold the
        same tensor.
    """
    files = sorted(name for name in os.listdir(folder) if name.endswith(SUFFIX))
    if os.path.exists(os.path.join(folder, INDEX)):
        if WHOLE not in files or WHOLE in _read_index(os.path.join(folder, INDEX)).values():
            return _by_index(folder)
        note(f"{folder} holds both {WHOLE} and {INDEX}: only {WHOLE} is read.")
        files = [WHOLE]
    if not files:
        raise UserError(_no_weights(folder))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, stored in read_header(os.path.join(folder, file)).items():
            if name in tensors:
                raise UserError(
                    f"{name!r} is both in {tensors[name].path} and in {stored.path}, and no "
                    f"{INDEX} says which counts; remove the file that is not part of the model."
                )
            tensors[name] = stored
    return tensors


def aliases(file: str) -> dict[str, str]:
    """Returns the aliases in a safetensors file's metadata: alias -> name of the stored tensor."""
    return {k: v for k, v in read_metadata(file).items() if isinstance(v, str)}


def _by_index(folder: str) -> dict[str, TensorInfo]:
    weight_map = _read_index(os.path.join(folder, INDEX))
    headers = {}
    for file in sorted(set(weight_map.values())):
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            raise UserError(f"{path} is missing, but {INDEX} names it; download it.")
        headers[file] = read_header(path)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise UserError(
                f"{os.path.join(folder, file)} lacks {name!r}, which {INDEX} places there; "
                "download both files again."
            )
    # The tensors follow the order of their data, so that each file is read from start to end.
    return {
        name: stored
        for file, header in headers.items()
        for name, stored in header.items()
        if weight_map.get(name) == file
    }


def _read_index(path: str) -> dict[str, str]:
    try:
        weight_map = read_json(path)["weight_map"]
        if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is corrupt: it must hold a JSON object whose 'weight_map' gives each tensor's "
            "file; download it again."
        ) from None
    return weight_map


def _no_weights(folder: str) -> str:
    pickles = sorted(name for name in os.listdir(folder) if name.endswith(PICKLES))
    if pickles:
        return (
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code and is not "
            "read; convert it to safetensors with transformers' "
            "save_pretrained(safe_serialization=True)."
        )
    return f"{folder} holds no weights: give a folder with *{SUFFIX} files, or a converted one."
