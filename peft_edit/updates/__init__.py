"""Update rules by name. A new one is a class: derive from `Update` (or `Folded`) and put it into `UPDATES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .base import ModuleSolution, Task, Update
from .folded import Constrained, Folded, Forgetful, RankOne, Sparse
from .normalized import Normalized
from .ridge import NullSpace, Restrained, Ridge


UPDATES: dict[str, type[Update]] = {
    update.name: update
    for update in (Ridge, NullSpace, Restrained, Forgetful, Sparse, Constrained, RankOne, Normalized)
}

__all__ = ["UPDATES", "Folded", "ModuleSolution", "Task", "Update", "make_update"]


def make_update(name: str, settings: Mapping[str, Any] | None = None) -> Update:
    """The rule of that name.

    Args:
        name (`str`): One of `UPDATES`.
        settings (`Mapping`, *optional*): Fields of its class; what is left out has its default.

    Raises:
        ValueError: if there is no such rule or setting, or a value is out of range.
    """
    if name not in UPDATES:
        raise ValueError(f"There is no update {name!r}; there are {sorted(UPDATES)}.")
    kind, settings = UPDATES[name], dict(settings or {})
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"The update {name!r} has no setting {unknown[0]!r}; it has {sorted(known)}.")
    wrong = [key for key, value in settings.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    if wrong:
        raise ValueError(f"The setting {wrong[0]!r} of update {name!r} must be a number, got {settings[wrong[0]]!r}.")
    update = kind(**settings)
    update.check()
    return update
