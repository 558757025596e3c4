"""Who takes part in a comparison: a method, the regularisers added to it, and how both are written in one word."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from inspect import signature
from typing import Any

from ...baselines import FineTuning, LoraTraining
from ...config import EditConfig
from ...methods import METHODS


BASELINES: Mapping[str, type[FineTuning] | type[LoraTraining]] = {"ft": FineTuning, "lora": LoraTraining}

# What a name after a plus sign changes in a method.
REGULARISERS: Mapping[str, Mapping[str, Any]] = {
    "mpes": {"early_stopping": "mpes"},
    "norm": {"norm_penalty": "auto"},
    "lti": {"lti": True},
    "nas": {"value_norm": "anchored"},
}


@dataclass(frozen=True)
class Entrant:
    """One way to edit.

    Args:
        label (`str`): Its name in tables and figures; different for every entrant.
        method (`str`): A name in `peft_edit.methods.METHODS`, or `"ft"` or `"lora"` (`peft_edit.baselines`).
        settings (`Mapping`): Fields of `EditConfig` that differ from the method's; of a baseline, its arguments.
        regularisers (`tuple[str, ...]`): Names in `REGULARISERS` that the settings come from; figures group by them.

    Raises:
        ValueError: if method or settings do not exist, or a value is out of range.
    """

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    regularisers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.label.strip() or self.label == "base":
            raise ValueError(f"An entrant needs a label, and not that of the unedited base: got {self.label!r}.")
        if self.method not in METHODS and self.method not in BASELINES:
            known = [*METHODS, *BASELINES]
            raise ValueError(f"There is no method {self.method!r} for {self.label!r}; there are {', '.join(known)}.")
        known = (
            list(signature(BASELINES[self.method]).parameters)[2:]
            if self.is_baseline
            else [each.name for each in fields(EditConfig)]
        )
        unknown = [name for name in self.settings if name not in known]
        if unknown:
            raise ValueError(
                f"{self.label!r}: {self.method!r} has no setting {unknown[0]!r}; it has {', '.join(known)}."
            )
        if not self.is_baseline:
            self.config(0)

    @property
    def is_baseline(self) -> bool:
        """Whether it trains weights, instead of editing through the adapter."""
        return self.method in BASELINES

    @property
    def traits(self) -> frozenset[str]:
        """The regularisers in force, named or part of the method."""
        own = {"encore": {"mpes", "norm"}}.get(self.method, set())
        return frozenset(self.regularisers) | own

    @property
    def folder_name(self) -> str:
        """The label with nothing in it that a file system would mind."""
        return re.sub(r"[^\w.+=-]", "_", self.label)

    def config(self, seed: int) -> EditConfig:
        """The settings of an adapter with that seed.

        Raises:
            ValueError: naming the entrant, if a value is out of range.
        """
        try:
            return EditConfig.from_method(self.method, **{"task_type": "CAUSAL_LM", "seed": seed, **self.settings})
        except ValueError as error:
            raise ValueError(f"{self.label!r}: {error}") from error


def parse_entrant(text: str) -> Entrant:
    """Reads `"method"`, `"method+regulariser+…"` or `"method+field=value+…"`.

    Args:
        text (`str`): Such as `"memit"`, `"memit+mpes+norm"`, `"encore+norm_budget=0.5"`, `"lora+lr=0.0005"`. A value
            is JSON; what is none is taken as text. The text is the entrant's label.

    Raises:
        ValueError: naming the part that is unknown, and those there are.
    """
    method, *parts = [part.strip() for part in text.split("+")]
    settings: dict[str, Any] = {}
    regularisers = []
    for part in parts:
        name, equals, value = part.partition("=")
        if equals:
            found: Mapping[str, Any] = {name.strip(): _value(value.strip())}
        elif part not in REGULARISERS:
            raise ValueError(
                f"There is no regulariser {part!r} in {text!r}; there are {', '.join(REGULARISERS)}, or field=value."
            )
        elif method in BASELINES:
            raise ValueError(f"{method!r} in {text!r} has no target search and no solver: it takes no {part!r}.")
        else:
            found = REGULARISERS[part]
            regularisers.append(part)
        twice = sorted(set(found) & set(settings))
        if twice:
            raise ValueError(f"{text!r} sets {twice[0]!r} twice.")
        settings.update(found)
    return Entrant("+".join([method, *parts]), method, settings, tuple(regularisers))


def as_entrants(entrants: Iterable[str | Entrant]) -> list[Entrant]:
    """Entrants, and words that are read as such.

    Raises:
        ValueError: if there are none, one cannot be read, or two have one label.
    """
    if isinstance(entrants, str):
        raise ValueError(f"Give the entrants as a list, such as [{entrants!r}].")
    found = [each if isinstance(each, Entrant) else parse_entrant(each) for each in entrants]
    if not found:
        raise ValueError("There is nothing to compare: give at least one entrant, such as 'memit+mpes'.")
    names = [each.folder_name for each in found]
    twice = [each.label for each in found if names.count(each.folder_name) > 1]
    if twice:
        raise ValueError(f"Two entrants are called {twice[0]!r}: give each a label of its own.")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
