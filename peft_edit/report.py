"""What an editing call did, fact by fact and module by module."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class FactReport:
    """One fact.

    Args:
        id (`str`): Identifier in the adapter.
        subject (`str`), prompt (`str`), target (`str`): The fact.
        written (`bool`): False if its target search diverged; such a fact is not in the adapter.
        converged (`bool`): At the end of the search every target token was most probable in every context.
        steps (`int`): Optimiser steps of the search.
        search_probability (`float`): Target probability at the end of the search, mean over contexts.
        probability (`float`): Target probability (geometric mean over its tokens) for the bare prompt once the batch
            was written.
        recalled (`bool`): The edited model greedily completes the bare prompt with the target.
        replaced (`str`, *optional*): The target that this fact had in the adapter before.
    """

    id: str
    subject: str
    prompt: str
    target: str
    written: bool
    converged: bool
    steps: int
    search_probability: float
    probability: float
    recalled: bool
    replaced: str | None = None


@dataclass(frozen=True)
class ModuleReport:
    """One edited module after the last batch.

    Args:
        name (`str`): Module name in the base model.
        norm (`float`): ||Delta||_F.
        share (`float`): ||Delta||_F / ||W0||_F.
        budget (`float`, *optional*): The largest share allowed.
        preservation_weight (`float`): lambda_p in force.
        norm_penalty (`float`): lambda_n in force (raised above the configured one where the budget binds).
        budget_binding (`bool`): Whether the budget raised it.
    """

    name: str
    norm: float
    share: float
    budget: float | None
    preservation_weight: float
    norm_penalty: float
    budget_binding: bool


@dataclass
class EditReport:
    """What `edit_facts` returns: prints as a table, converts to dict, JSON and pandas.

    Args:
        facts (`list[FactReport]`): In the order given.
        modules (`list[ModuleReport]`): State after the call.
        norms (`list[dict[str, float]]`): ||Delta||_F / ||W0||_F of each module after each batch.
        seconds (`dict[str, float]`): Wall-clock seconds per stage.
        facts_held (`int`): Facts in the adapter after the call.
    """

    facts: list[FactReport] = field(default_factory=list)
    modules: list[ModuleReport] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    facts_held: int = 0

    @property
    def written(self) -> int:
        """Facts written by this call."""
        return sum(fact.written for fact in self.facts)

    @property
    def recalled(self) -> int:
        """Facts that the edited model completes with the target."""
        return sum(fact.recalled for fact in self.facts)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python containers, ready for JSON."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_pandas(self) -> Any:
        """One row per fact, as a `pandas.DataFrame`. Needs pandas."""
        import pandas

        return pandas.DataFrame([asdict(fact) for fact in self.facts])

    def __str__(self) -> str:
        return "\n".join([self._summary(), "", self._fact_table(), "", self._module_table()])

    def _summary(self) -> str:
        total = sum(self.seconds.values())
        count = len(self.facts)
        speed = f", {count / total:.1f} facts/s" if total > 0 and count else ""
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        lines = [
            f"{self.written} of {count} facts written, {self.recalled} recalled; the adapter holds {self.facts_held}.",
            f"{total:.1f} s{speed} ({stages})",
        ]
        replaced = sum(fact.replaced is not None for fact in self.facts)
        if replaced:
            lines.append(f"{replaced} replaced an older target of the same subject and prompt.")
        return "\n".join(lines)

    def _fact_table(self, most: int = 20) -> str:
        rows = [
            (
                fact.id,
                _short(fact.prompt.replace("{}", fact.subject, 1), 48),
                _short(fact.target.strip(), 18),
                "no" if not fact.written else ("replaced" if fact.replaced is not None else "yes"),
                str(fact.steps),
                "yes" if fact.converged else "no",
                f"{fact.search_probability:.3f}",
                f"{fact.probability:.3f}",
                "yes" if fact.recalled else "no",
            )
            for fact in self.facts[:most]
        ]
        head = ("id", "prompt", "target", "written", "steps", "MPES", "p search", "p edited", "recalled")
        more = [f"… and {len(self.facts) - most} more facts"] if len(self.facts) > most else []
        return "\n".join([_table(head, rows), *more])

    def plot(self, budget: float | None = None, ax: Any = None) -> Any:
        """||Δ||_F / ||W0||_F of each module over the batches, as a figure; see `peft_edit.analysis.plot_norms`."""
        from .analysis import plot_norms

        return plot_norms(self, budget, ax)

    def _module_table(self) -> str:
        rows = [
            (
                module.name,
                f"{module.norm:.4g}",
                f"{100 * module.share:.2f}%",
                "-" if module.budget is None else f"{100 * module.budget:.2f}%",
                f"{module.preservation_weight:.4g}",
                f"{module.norm_penalty:.4g}",
                "yes" if module.budget_binding else "no",
            )
            for module in self.modules
        ]
        return _table(("module", "||Δ||", "of ||W0||", "budget", "λp", "λn", "binding"), rows)


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
