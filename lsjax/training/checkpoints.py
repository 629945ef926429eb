"""Checkpoints of a run that is to go on as if it had never stopped."""

import contextlib
import os
from collections.abc import Iterator

import orbax.checkpoint.experimental.v1 as ocp

from lsjax.checkpoint.new_folder import is_disk_full
from lsjax.errors import UserError
from lsjax.training.packing import Place
from lsjax.training.step import TrainState


class Checkpoints:
    """The last few states of a run, each with the place in the data that comes next.

    They are written while training goes on, and appear when they are whole: a process that dies
    leaves the one before. Of several processes each writes what its own devices hold.

    A context manager, which waits for what is being written.
    """

    def __init__(self, folder: str, keep: int):
        """Opens a folder, and makes it where it is not there.

        Args:
          folder: that holds nothing else.
          keep: how many checkpoints are kept.
        """
        self._folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            os.path.abspath(folder),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self._checkpointer.close()

    def latest(self) -> int | None:
        """The step of the last whole checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, place: Place) -> None:
        """Begins to write a checkpoint; waits for the one before.

        Raises:
          UserError: the disk ran full.
        """
        with self._writing():
            self._checkpointer.save_async(step, {"state": state, "place": vars(place)}, force=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_disk_full(error):
                raise UserError(
                    f"the disk of {self._folder} ran full; make room, and the same command goes on "
                    "from the last whole checkpoint."
                ) from error
            raise

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, Place]:
        """A checkpoint's state, on the mesh, and its place in the data.

        Args:
          step: of the checkpoint.
          shapes: shapes, dtypes and shardings of the state.

        Raises:
          UserError: it cannot be read.
        """
        wanted = {"state": shapes, "place": dict.fromkeys(vars(Place()), 0)}
        try:
            found = self._checkpointer.load(step, wanted)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{os.path.join(self._folder, str(step))} cannot be read by Orbax ({reason}); "
                "remove it to go on from the checkpoint before."
            ) from error
        return found["state"], Place(**found["place"])
