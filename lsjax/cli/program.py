"""Runs programs: parses flags, prints errors and notes in one line, copes with closed pipes."""

import contextlib
import importlib
import io
import logging as std_logging
import os
import sys
import types
from collections.abc import Callable, Iterator

import jax
from absl import app, flags, logging

from lsjax.cli.flags import connect
from lsjax.runtime import notes
from lsjax.runtime.errors import UserError
from lsjax.runtime.primary import silence_other_processes
from lsjax.runtime.progress import events_to


def run_program(
    main: Callable[[list[str]], object],
    define_flags: Callable[[], None] = lambda: None,
    words: bool = False,
) -> None:
    """Parses a program's flags, runs its main(argv) and exits.

    A user's mistake in flags or input is reported in one line on stderr, with exit status 2.

    Args:
      main: the program, called with its name and the words on the command line that are not
        flags; --help begins with the docstring of its module.
      define_flags: function that defines the program's flags, which --help lists.
      words: whether words that are not flags are allowed; flags may stand before or after them.
    """
    before = set(flags.FLAGS)
    define_flags()
    for name in set(flags.FLAGS) - before:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    sys.modules["__main__"].__doc__ = sys.modules[main.__module__].__doc__
    flags.FLAGS.set_gnu_getopt(words)

    def guarded(argv: list[str]) -> object:
        try:
            if len(argv) > 1 and not words:
                raise UserError(f"{argv[1]!r} is not a flag; give every value as --name=value.")
            if "coordinator_address" in flags.FLAGS:
                connect()
            events = flags.FLAGS.progress_json if "progress_json" in flags.FLAGS else None
            with silence_other_processes(), _notes_are_printed(), events_to(events):
                return main(argv)
        except UserError as error:
            _fail(error)
        except BrokenPipeError:  # the reader of the output has closed the pipe
            _hide_output()
            return 0

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack some characters
    app.run(guarded, flags_parser=_parse_flags)


def say(text: str, end: str = "\n") -> None:
    """Prints and flushes; a closed pipe ends the program unless it also writes --output_json."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        if "output_json" not in flags.FLAGS or not flags.FLAGS.output_json:
            raise
        _hide_output()


def import_extra(name: str, module: str) -> types.ModuleType:
    """Imports a module that needs one of the package's extras.

    Raises:
      UserError: a package that the module imports is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"this needs {error.name}, which is not installed; pip install 'lsjax[{name}]'."
        ) from None


def make_cpu_devices(count: int) -> None:
    """Splits the CPU into `count` JAX devices; has no effect once the devices are in use."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def _hide_output() -> None:
    """Discards all further output, and what is still buffered for a closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # so that the flush at exit does not fail
    os.close(nowhere)


@contextlib.contextmanager
def _notes_are_printed() -> Iterator[None]:
    logger = std_logging.getLogger("lsjax")
    printed, propagate = notes.NotePrinter(say), logger.propagate
    logger.addHandler(printed)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(printed)
        logger.propagate = propagate


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(f"{error} (--help lists the flags)")
    # Libraries log every step they take; only an explicit --verbosity=0 shows that.
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)
    return rest


def _fail(error: object) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
