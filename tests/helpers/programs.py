"""Programs as their users start them, but within this process: imports and compiled code stay."""

import contextlib
import dataclasses
import io
import logging
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
from absl import app, flags
from absl import logging as absl_logging
from absl.testing import flagsaver

ROOT = Path(__file__).parents[2]
_FOLDERS = ("scripts", "checkpoints_convert")


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a program left, as subprocess.run says it."""

    returncode: int
    stdout: str
    stderr: str


def path_of(program: str) -> Path:
    """The file of a program that is named without its folder."""
    (path,) = (p for folder in _FOLDERS if (p := ROOT / folder / program).exists())
    return path


def run(program: str, *arguments: object, cwd: str | os.PathLike = ".") -> Finished:
    """Runs a program's file from its first line to its exit.

    Only an exit is caught: any other exception is the test's, as it would be a traceback for the
    user. What other code wrote to file descriptors is not seen.
    """
    jax.devices()  # which a program then finds as they are
    path = str(path_of(program))
    out, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        mock.patch.object(sys, "argv", [path, *map(str, arguments)]),
        _flags_of_its_own(path),
        _logging_of_its_own(),
        _configuration_of_its_own(),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
    assert isinstance(status, int), status
    return Finished(status, out.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _flags_of_its_own(path: str) -> Iterator[None]:
    """The program's flags go again, and all others get the values back that they had."""
    app.define_help_flags()  # once in a process
    parsed, before = flags.FLAGS.is_parsed(), flagsaver.save_flag_values()
    try:
        yield
    finally:
        for name in list(flags.FLAGS):
            module = flags.FLAGS.find_module_defining_flag(name)
            if module == path or module.startswith("lsjax."):
                delattr(flags.FLAGS, name)
        # Those of libraries that were imported within stay as well.
        flagsaver.restore_flag_values(flagsaver.save_flag_values() | before)
        if not parsed:
            flags.FLAGS.unparse_flags()


@contextlib.contextmanager
def _logging_of_its_own() -> Iterator[None]:
    """Messages go to stderr, as absl.app arranges it once in a process."""
    loggers = {logger: logger.level for logger in (logging.root, absl_logging.get_absl_logger())}
    handlers, handler = logging.root.handlers[:], absl_logging.get_absl_handler()
    absl_logging.use_absl_handler()
    stream = handler.python_handler.setStream(sys.stderr)
    try:
        yield
    finally:
        if stream is not None:
            handler.python_handler.setStream(stream)
        logging.root.handlers[:] = handlers
        for logger, level in loggers.items():
            logger.setLevel(level)


@contextlib.contextmanager
def _configuration_of_its_own() -> Iterator[None]:
    """The environment and JAX's configuration are put back."""
    before = dict(jax.config.values)
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            for name, value in jax.config.values.items():
                if value != before[name]:
                    jax.config.update(name, before[name])
