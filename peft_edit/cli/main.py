"""From arguments to an exit code: runs a command, shows its result, and says in one sentence what went wrong."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UsageError, exit_code, sentence
from .output import Output
from .parser import build_parser


PACKAGE = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `peft-edit`.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments; by default those of the process.

    Returns:
        `int`: 0; 1 for an error in the work; 2 for arguments that cannot be; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser().parse_args(arguments)
    except UsageError as error:
        Output(as_json="--json" in arguments).error(sentence(error), exit_code(error))
        return exit_code(error)
    except SystemExit as ended:  # --help, --version
        return int(ended.code or 0)
    out = Output(as_json=args.json, quiet=args.quiet)
    try:
        with _quiet_libraries(), _short_warnings(out):
            result = args.run(args, out)
            out.show(result)
            sys.stdout.flush()
        return result.exit_code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        out.error(sentence(error), exit_code(error))
        return exit_code(error)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No log lines nor progress bars of transformers and the Hub's client; as before afterwards."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _short_warnings(out: Output) -> Iterator[None]:
    """Warnings meant for users as one line each, without the line of code that raised them."""

    def show(message: Any, category: type[Warning], filename: str, *_line: Any, **_more: Any) -> None:
        if category is UserWarning and PACKAGE in Path(filename).parents:
            out.note(f"Note: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
