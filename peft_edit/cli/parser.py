"""The command line's grammar."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from .commands import (
    completion,
    demo,
    diff,
    edit,
    evaluate,
    export_lora,
    locate,
    merge,
    push,
    remove,
    show,
    stats,
)
from .errors import UsageError


COMMANDS: dict[str, ModuleType] = {
    "edit": edit,
    "eval": evaluate,
    "stats": stats,
    "locate": locate,
    "show": show,
    "diff": diff,
    "remove": remove,
    "merge": merge,
    "export-lora": export_lora,
    "push": push,
    "demo": demo,
    "completion": completion,
}

DESCRIPTION = "Lifelong knowledge editing as a PEFT adapter."
EPILOG = (
    "exit codes: 0 done, 1 an error in the work, 2 wrong arguments, 130 interrupted. "
    "`peft-edit COMMAND --help` explains a command; `peft-edit demo` needs no arguments."
)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> Parser:
    """The parser of all commands; `args.run` is the function of the chosen one, `args.parser` this parser."""
    parser = Parser(prog="peft-edit", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers: Any = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").strip().split("\n", 1)[0]
        sub = subparsers.add_parser(name, help=summary, description=summary)
        command.add_arguments(sub)
        _add_common(sub)
        sub.set_defaults(run=command.run, parser=parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON document on stdout; everything else on stderr")
    group.add_argument("--quiet", action="store_true", help="no notes and no progress on stderr")
    group.add_argument("--debug", action="store_true", help="show the traceback of a failure")
