"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from ..config import EditConfig
from .errors import UsageError
from .models import DTYPES


def add_model_options(parser: argparse.ArgumentParser, named: bool = True) -> None:
    """How to load the base model; with `named` also which, where the adapter says it already."""
    group = parser.add_argument_group("base model")
    if named:
        group.add_argument("--model", help="directory, Hub id, or 'tiny'; by default the one that the adapter names")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="by default as it was saved")
    group.add_argument("--device", help="such as cpu, cuda:1, or auto to spread the model; by default the first GPU")
    group.add_argument("--revision", help="of the model on the Hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run model code of the repository")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Which rows of a dataset, and how many."""
    group = parser.add_argument_group("facts")
    group.add_argument("--subset", help="of a dataset on the Hub")
    group.add_argument("--split", default="train", help="of a dataset; by default train")
    group.add_argument("--data-revision", help="of a dataset on the Hub")
    group.add_argument("--limit", type=positive, metavar="N", help="take the first N facts")


def add_set_option(parser: Any) -> None:
    """`--method` and `--set`."""
    from ..methods import METHODS

    parser.add_argument("--method", choices=sorted(METHODS), help="preset of settings; by default encore")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="FIELD=VALUE",
        help="any field of EditConfig, such as norm_budget=0.05 or layers_to_transform=1,2",
    )


def positive(text: str) -> int:
    """A whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def directory(text: str) -> Path:
    """The path of a directory, there or not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected the path of a directory, got an empty text")
    return Path(text)


# --- settings ----------------------------------------------------------------------------------------------------


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """`FIELD=VALUE` texts as values of `EditConfig`'s fields.

    A value is JSON (`0.05`, `true`, `null`, `[1, 2]`), a list of whole numbers with commas, or plain text.

    Raises:
        UsageError: if there is no such field, or no value.
    """
    known = config_fields()
    found = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not text.strip():
            raise UsageError(f"--set {assignment!r}: write it as FIELD=VALUE, such as norm_budget=0.05.")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sorted(known))}."
            raise UsageError(f"--set {assignment!r}: EditConfig has no field '{name}'; {hint}")
        found[name] = _value(text.strip())
    return found


def config_fields() -> set[str]:
    """Fields of `EditConfig` that are its own."""
    return {field.name for field in fields(EditConfig)} - {field.name for field in fields(PeftConfig)}


def _value(text: str) -> Any:
    words: dict[str, Any] = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1:
        return [int(part) if part.lstrip("-").isdigit() else part for part in parts]
    return text


def make_config(method: str | None, settings: dict[str, Any]) -> EditConfig:
    """The config of a method with changes.

    Raises:
        UsageError: if a value is out of range.
    """
    try:
        return EditConfig.from_method(method or "encore", task_type="CAUSAL_LM", **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"These settings cannot be: {error}") from error
