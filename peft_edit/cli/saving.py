"""Writing a directory at once: staged whole inside it, then moved into place; a move that was cut short is finished.

The directory itself is never replaced, so it may be the working directory or a mount, and hold other files.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import sync_directory
from .errors import CliError


STAGED, READY = ".unfinished-save", ".finished-save"
_PLAN = "moves.json"


def check_writable(directory: Path) -> None:
    """Whether a directory can be written, before any work is put into it. Leaves nothing behind.

    Raises:
        CliError: if it is a file.
        OSError: if it cannot be made or written.
    """
    if directory.exists() and not directory.is_dir():
        raise CliError(f"'{directory}' is a file, and a directory is needed: choose another --output.")
    with _made(directory) as made:
        probe = directory / ".writable"
        try:
            probe.write_bytes(b"1")
        finally:
            probe.unlink(missing_ok=True)
    _remove(made)


def write_directory(directory: Path, write: Callable[[Path], Any], stale: Collection[str] = ()) -> None:
    """Calls `write` on an empty staging directory and moves all that it wrote into `directory`.

    Args:
        directory (`Path`): Where to; made if needed. If anything fails it is as it was.
        write: Takes the staging directory.
        stale (`Collection[str]`): Patterns of file names that belong to what is replaced: those that `write` did not
            write anew are removed.
    """
    finish_save(directory)
    with _made(directory):
        staged = directory / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        try:
            staged.mkdir()
            write(staged)
            names = sorted(path.name for path in staged.iterdir())
            old = sorted(
                {path.name for pattern in stale for path in directory.glob(pattern) if path.is_file()} - set(names)
            )
            (staged / _PLAN).write_text(json.dumps({"move": names, "remove": old}), encoding="utf-8")
            for path in staged.rglob("*"):
                if path.is_file():
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
            sync_directory(staged)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        with _uninterrupted():
            os.replace(staged, directory / READY)  # from here on the new content is what the directory holds
            finish_save(directory)


def finish_save(directory: Path) -> None:
    """Moves into place what an earlier process had written whole but, being killed, not moved."""
    ready = directory / READY
    if not ready.is_dir():
        return
    plan = json.loads((ready / _PLAN).read_text(encoding="utf-8"))
    for name in plan["remove"]:
        (directory / name).unlink(missing_ok=True)
    for name in plan["move"]:
        if (ready / name).exists():
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
            os.replace(ready / name, directory / name)
    sync_directory(directory)
    shutil.rmtree(ready)


@contextmanager
def _made(directory: Path) -> Iterator[list[Path]]:
    """The directory, with those above it; those that had to be made are taken away again on failure."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield missing
    except BaseException as error:
        _remove(missing)
        if isinstance(error, FileNotFoundError) and not directory.exists():
            raise CliError(f"'{directory}' cannot be made there: choose another --output.") from error
        raise


def _remove(directories: Collection[Path]) -> None:
    for path in directories:  # the innermost first
        try:
            path.rmdir()
        except OSError:
            return


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds a Ctrl-C back until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *call: held.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(*held[0])
