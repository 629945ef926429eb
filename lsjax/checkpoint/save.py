"""The parameter tree on a mesh -> a converted folder."""

import contextlib
import os

import jax

from lsjax.checkpoint.carried import carried_bytes, carry
from lsjax.checkpoint.new_folder import new_folder
from lsjax.checkpoint.orbax_checkpoint import save_all
from lsjax.hosts import from_the_first, is_first


def save_parameters(params: dict, like: str | os.PathLike[str], out: str | os.PathLike[str]):
    """Writes a converted folder, which any mesh can restore.

    Of several processes each writes what its own devices hold; they share the disk.

    Args:
      params: the tree that load_parameters returns.
      like: the model folder whose config, tokenizer and generation files go with it.
      out: the folder to make; it appears when it is complete.

    Raises:
      UserError: `out` is taken, or the disk is too small.
    """
    like, out = os.fspath(like), os.fspath(out)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + carried_bytes(like)
    with contextlib.ExitStack() as stack:
        folder = from_the_first(lambda: stack.enter_context(new_folder(out, nbytes)))
        save_all(folder, params)
        if is_first():
            carry(like, folder)
    from_the_first(lambda: out)  # nobody goes on before it is there
