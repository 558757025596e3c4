"""What goes wrong, in one sentence each, and the exit code that belongs to it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path


ERROR, USAGE, INTERRUPTED = 1, 2, 130

FULL_DISK = "The disk is full: free some space, or choose another --output; nothing that was there is lost."

_BY_NUMBER = {
    errno.EROFS: "{place} is on a read-only disk: choose another directory.",
    errno.EACCES: "There is no permission for {place}: choose another path, or change its permissions.",
    errno.EPERM: "There is no permission for {place}: choose another path, or change its permissions.",
    errno.ENOTDIR: "{place} leads through a file that is not a directory: choose another path.",
    errno.EISDIR: "{place} is a directory where a file is needed.",
    errno.EEXIST: "{place} is a file where a directory is needed: choose another path.",
    errno.ENOENT: "There is no {place}.",
    errno.ENAMETOOLONG: "{place} is too long a name for a file: choose a shorter one.",
}


class CliError(Exception):
    """A failure whose message is written for the user."""

    exit_code = ERROR


class UsageError(CliError):
    """Arguments that cannot be."""

    exit_code = USAGE


class Interrupted(CliError):
    """Ctrl-C, with a word on how to go on."""

    exit_code = INTERRUPTED


def exit_code(error: BaseException) -> int:
    """The process's exit code after this error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, CliError) else ERROR


def sentence(error: BaseException) -> str:
    """What to tell the user, in one line."""
    return " ".join(_explain(error).split())


def _explain(error: BaseException) -> str:
    if isinstance(error, CliError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted; nothing was written."
    if _is_full_disk(error):
        return FULL_DISK
    if isinstance(error, OSError) and error.errno in _BY_NUMBER:
        return _BY_NUMBER[error.errno].format(place=_place(error))
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            "The memory is full: take a narrower --dtype, fewer facts at a time (--batch-size), or --device auto, "
            "which spreads the model."
        )
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str(KeyError) would quote it
    if isinstance(error, (ImportError, OSError, RuntimeError, TypeError, ValueError)) and str(error).strip():
        return _first_part(str(error))
    return f"Unexpected {type(error).__name__}: {error}. Run it again with --debug to see where."


def _first_part(message: str) -> str:
    """A message up to its first blank line, which is where other libraries begin to explain at length."""
    return re.split(r"\n\s*\n", message.strip(), maxsplit=1)[0]


def _place(error: OSError) -> str:
    name = error.filename if error.filename is not None else error.filename2
    return f"'{os.fspath(name)}'" if isinstance(name, (str, Path)) else "this path"


def _is_full_disk(error: BaseException) -> bool:
    """Of Python's own errors by number, of the Rust and C++ libraries by text."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(cause) or "os error 28" in str(cause):
            return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def explain_hub(error: BaseException, name: str, revision: str | None = None) -> str | None:
    """What the Hub said of a repository, or that it said nothing; None if this is no failure of the Hub.

    Args:
        error: What was raised, by whatever library; what led to it is looked at too.
        name (`str`): The repository.
        revision (`str`, *optional*): Its revision.
    """
    from huggingface_hub import HfApi, errors

    from ..hub_errors import explained

    kinds = (
        errors.HfHubHTTPError,
        errors.HTTPError,
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
    )
    for cause in _causes(error):
        if isinstance(cause, kinds):
            clear = explained(cause, name, HfApi().endpoint, revision)
            if clear is not None:
                return str(clear)
    return None
