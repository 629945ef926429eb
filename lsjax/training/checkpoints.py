"""Checkpoints from which a run resumes as if it had never stopped."""

import contextlib
import os
from collections.abc import Iterator

import orbax.checkpoint.experimental.v1 as ocp

from lsjax.checkpoint.atomic_directory import is_disk_full
from lsjax.runtime.errors import UserError
from lsjax.training.packing import DataPosition
from lsjax.training.step import TrainState


class Checkpoints:
    """The latest states of a run, each with the position in the data that comes next.

    Checkpoints are written while training goes on and appear once they are complete: a process
    that dies leaves the previous one. Each process writes what its own devices hold.

    Use it as a context manager; on exit it waits for pending writes.
    """

    def __init__(self, folder: str, keep_checkpoints: int):
        """Opens a folder, and creates it if it does not exist.

        Args:
          folder: a folder that holds nothing else.
          keep_checkpoints: number of latest checkpoints to keep.
        """
        self._folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            os.path.abspath(folder),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep_checkpoints),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self._checkpointer.close()

    def latest(self) -> int | None:
        """Returns the step of the last complete checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, data_position: DataPosition) -> None:
        """Starts to write a checkpoint, after waiting for the previous one.

        Raises:
          UserError: the disk ran full.
        """
        with self._writing():
            self._checkpointer.save_async(
                step, {"state": state, "place": vars(data_position)}, force=True
            )

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

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, DataPosition]:
        """Returns a checkpoint's state, on the mesh, and its position in the data.

        Args:
          step: the checkpoint's step.
          shapes: shapes, dtypes and shardings of the state.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        wanted = {"state": shapes, "place": dict.fromkeys(vars(DataPosition()), 0)}
        try:
            found = self._checkpointer.load(step, wanted)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{os.path.join(self._folder, str(step))} cannot be read by Orbax ({reason}); "
                "remove it to go on from the checkpoint before."
            ) from error
        return found["state"], DataPosition(**found["place"])
