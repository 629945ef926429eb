"""What the programs share: the flags that say which model, and reporting errors."""

import contextlib
import importlib
import io
import logging as std_logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import app, flags, logging

from lsjax import hosts, notes
from lsjax.cache import CACHE_DTYPES
from lsjax.errors import UserError
from lsjax.settings import COMPUTE_DTYPES

# Flags that are defined here belong to the program that asks for them: its --help lists them.
flags.disclaim_key_flags()


def define_model_flags() -> None:
    """The flags that say which model runs, on what, and in which numbers."""
    flags.DEFINE_string(
        "model_path", None, "Model folder (Hugging Face, or converted); the shipped one if not."
    )
    flags.DEFINE_enum("dtype", "auto", ["auto", *COMPUTE_DTYPES], "Of weights and activations.")
    flags.DEFINE_enum("kv_cache_dtype", "auto", ["auto", *CACHE_DTYPES], "Of the KV cache.")
    flags.DEFINE_integer(
        "prefill_chunk",
        None,
        "Tokens of prompt run at once; a few more where they must be shared by a context axis.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "kv_compression",
        "none",
        "razor: heads that do not retrieve keep a window (or settings, as in "
        "'{\"window\": 2000}'); none.",
    )
    define_mesh_flags()


def define_mesh_flags() -> None:
    """The flags that say which devices, of which processes, a program takes."""
    flags.DEFINE_string("mesh", "", "Devices by axis (data, context, model): context=4,model=2.")
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "Of several processes that run one model: host:port of process 0; or auto, where Slurm, a "
        "TPU pod, GKE or MPI says it.",
    )
    flags.DEFINE_integer("num_processes", None, "How many they are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is.", lower_bound=0)
    flags.DEFINE_integer(
        "coordinator_timeout", 300, "Seconds to wait for the others.", lower_bound=1
    )


def make_cpu_devices(count: int) -> None:
    """Makes so many devices of a CPU; a process that uses its devices already keeps those."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def connect() -> None:
    """Joins the other processes, if flags say that there are any.

    Raises:
      UserError: the flags do not go together, or somebody has not come in time.
    """
    address, count, number = (
        flags.FLAGS[n].value for n in ("coordinator_address", "num_processes", "process_id")
    )
    if address:
        hosts.connect(address, count, number, flags.FLAGS.coordinator_timeout)
    elif count is not None or number is not None:
        raise UserError("num_processes and process_id go with coordinator_address; give it too.")


def model_options() -> dict[str, Any]:
    """What define_model_flags were given, as the arguments of lsjax.settings.settle."""
    names = ("dtype", "kv_cache_dtype", "kv_compression", "mesh", "prefill_chunk")
    return {"path": flags.FLAGS.model_path} | {n: flags.FLAGS[n].value for n in names}


def extra(name: str, module: str) -> types.ModuleType:
    """A module that needs what one of the package's extras installs.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"this needs {error.name}, which is not installed; pip install 'lsjax[{name}]'."
        ) from None


def lengths(words: list[str], flag: str = "lengths") -> list[int]:
    """A flag's list of lengths in tokens, as numbers.

    Raises:
      UserError: none, or something that is not a number above 0.
    """
    wrong = [n for n in words if not n.isdecimal() or int(n) < 1]
    if wrong or not words:
        raise UserError(f"--{flag} takes numbers of tokens, as in 512,2048, not {wrong}.")
    return [int(n) for n in words]


def run(main: Callable[[list[str]], object], words: bool = False) -> None:
    """Runs a program's main(argv) once its flags are read, and exits.

    What the user got wrong, in flags or input, is one line on stderr and exit status 2.

    Args:
      main: takes the program's name and the words on the command line that are not flags.
      words: whether there may be such words; flags may then stand before and after them.
    """
    flags.FLAGS.set_gnu_getopt(words)

    def guarded(argv: list[str]) -> object:
        try:
            if len(argv) > 1 and not words:
                raise UserError(f"{argv[1]!r} is not a flag; give every value as --name=value.")
            if "coordinator_address" in flags.FLAGS:
                connect()
            with hosts.only_the_first_talks(), _notes_are_printed():
                return main(argv)
        except UserError as error:
            _fail(error)
        except BrokenPipeError:  # whoever read the output has seen enough
            _hide_output()
            return 0

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know every character
    app.run(guarded, flags_parser=_parse_flags)


def say(text: str, end: str = "\n") -> None:
    """Prints at once. A reader who has gone ends a program, but not one that writes a file, too."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        if "output_json" not in flags.FLAGS or not flags.FLAGS.output_json:
            raise
        _hide_output()


def _hide_output() -> None:
    """Lets what is printed from here on go nowhere; what a closed pipe has not taken, too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # so that flushing at the end does not fail, either
    os.close(nowhere)


@contextlib.contextmanager
def _notes_are_printed() -> Iterator[None]:
    logger = std_logging.getLogger("lsjax")
    printed, propagate = notes.Printed(say), logger.propagate
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
    # Libraries report each step they take; that is shown where --verbosity=0 asks for it.
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)
    return rest


def _fail(error: object) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
