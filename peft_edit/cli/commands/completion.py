"""Print a completion script for bash, zsh or fish."""

from __future__ import annotations

import argparse

from ..output import Output, Result
from ..shells import SHELLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit completion`."""
    parser.add_argument("shell", choices=sorted(SHELLS), help="the shell that is to complete")


def run(args: argparse.Namespace, out: Output) -> Result:
    """The script, made from the parser."""
    script = SHELLS[args.shell](args.parser)
    return Result({"shell": args.shell, "script": script}, [script])
