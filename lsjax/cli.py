"""What every program does around its own main: read the flags, and report errors."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from lsjax.errors import UserError


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
            return main(argv)
        except UserError as error:
            _fail(error)

    app.run(guarded, flags_parser=_parse_flags)


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
