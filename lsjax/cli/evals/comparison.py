"""Flags that plot a measurement beside those of earlier runs."""

from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

from lsjax.evals.cells import read_cells
from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import check_writable

FLAGS = flags.FLAGS
_T = TypeVar("_T")


def define_plot_flags(figure: str) -> None:
    """Defines --plot, --compare and --label; `figure` names what --plot draws of one run alone."""
    flags.DEFINE_string("plot", None, f"PNG file to draw {figure} in.")
    flags.DEFINE_multi_string(
        "compare",
        [],
        "label=file, where --output_json of an earlier run wrote the file: plot its curve beside "
        "this run's. Repeat the flag for several.",
    )
    flags.DEFINE_string("label", "this", "Label of this run's curve with --compare.")


def read_earlier(parse: Callable[[dict[str, Any]], _T]) -> dict[str, _T]:
    """Reads the files of --compare, by label, before the long work; checks --plot too.

    Args:
      parse: cells of a file -> what is plotted of them.

    Raises:
      UserError: --plot cannot be written or is missing, or a value is no label=file with cells.
    """
    if FLAGS.plot:
        check_writable(FLAGS.plot)
    elif FLAGS.compare:
        raise UserError("--compare says what to plot; give --plot too.")

    def read(given: str) -> tuple[str, _T]:
        name, _, file = given.partition("=")
        try:
            return name, parse(read_cells(file))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"--compare {given!r} must be label=file, a file that --output_json of this "
                f"program wrote ({error})."
            ) from None

    return dict(map(read, FLAGS.compare))
