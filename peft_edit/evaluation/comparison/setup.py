"""What a comparison is given, checked before anything runs, and the directory that is for these arguments alone."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...adapter import check_counts
from ...facts import Fact, as_facts
from ...files import replace_file
from ...fingerprint import model_fingerprint
from ...statistics import KeyStatistics
from ..downstream_tasks import TASKS, DownstreamTask, load_task
from .entrants import Entrant
from .scoring import Plan


SETTINGS_JSON = "settings.json"


# --- arguments -------------------------------------------------------------------------------------------------


def edited_facts(facts: Any, edits: int | None) -> list[Fact]:
    listed = as_facts(facts)
    if edits is not None:
        check_counts(edits=(edits, 1))
        if edits > len(listed):
            raise ValueError(f"There are {len(listed)} facts, fewer than the {edits} edits asked for.")
        listed = listed[:edits]
    if not listed:
        raise ValueError("There are no facts to edit.")
    for index, fact in enumerate(listed):
        if fact.target_true is None:
            raise ValueError(
                f"Fact {index} ({fact.filled_prompt!r}) has no target_true, which the scores need: give it."
            )
    return listed


def unedited_pairs(unedited: Sequence[Any], edited: Sequence[Fact]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for place, item in enumerate(unedited):
        prompt, answer = (item.filled_prompt, item.target_true) if isinstance(item, Fact) else item
        if not answer:
            raise ValueError(
                f"Unedited fact {place} ({prompt!r}) has no target_true, which is what must be kept: give it."
            )
        pairs.append((prompt, answer))
    if not pairs:
        raise ValueError("There are no unedited facts: hold some back, such as facts[-100:].")
    both = {fact.filled_prompt for fact in edited} & {prompt for prompt, _ in pairs}
    if both:
        raise ValueError(f"{min(both)!r} is among the edited and the unedited facts: take it out of one of them.")
    return tuple(pairs)


def downstream_tasks(downstream: Any) -> list[DownstreamTask]:
    if downstream is None:
        return []
    if not isinstance(downstream, (str, os.PathLike)):
        return list(downstream)
    found = [load_task(name, downstream) for name in TASKS if (Path(downstream) / f"{name}.jsonl").is_file()]
    if not found:
        raise ValueError(f"'{downstream}' holds none of {', '.join(f'{name}.jsonl' for name in TASKS)}.")
    return found


def points_apart(score_every: int | None, batch_size: int, edits: int) -> int:
    if score_every is None:
        return batch_size * max(1, -(-edits // (10 * batch_size)))
    check_counts(score_every=(score_every, 1))
    if score_every % batch_size:
        raise ValueError(f"score_every must be whole batches, a multiple of {batch_size}, got {score_every}.")
    return score_every


# --- the directory ---------------------------------------------------------------------------------------------


def described(plan: Plan) -> dict[str, Any]:
    """The settings that must stay the same; facts and texts by what they hold."""
    return {
        "facts": _digest(plan.facts),
        "edits": len(plan.facts),
        "batch_size": plan.batch_size,
        "score_every": plan.score_every,
        "save_steps": plan.save_steps,
        "threads": plan.threads,
        "unedited": _digest(plan.unedited),
        "unedited_prompts": len(plan.unedited),
        "text": None if plan.text is None else _digest(plan.text),
        "downstream": {task.name: _digest(task) for task in plan.tasks},
        "downstream_shots": plan.shots,
        "downstream_limit": plan.limit,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def digest_of_statistics(statistics: KeyStatistics | Sequence[str] | None) -> str:
    if statistics is None:
        return "sampled from the model"
    if isinstance(statistics, KeyStatistics):
        moments = {name: float(moment.double().norm()) for name, moment in statistics.second_moments.items()}
        return _digest((statistics.tokens, sorted(moments.items())))
    if isinstance(statistics, str) or not isinstance(statistics, Sequence):
        raise ValueError("statistics must be KeyStatistics or a list of texts.")
    return _digest(tuple(statistics))


def enter(folder: Path, settings: dict[str, Any], entrants: Sequence[Entrant]) -> None:
    """Makes the directory this comparison's, or checks that it is.

    Raises:
        ValueError: if it was begun with other arguments; nothing in it is changed then.
    """
    path = folder / SETTINGS_JSON
    own = {each.label: {"method": each.method, "settings": dict(each.settings)} for each in entrants}
    own = json.loads(json.dumps(own, default=sorted))
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"settings": settings, "entrants": {}}
    differ = [name for name in settings if held["settings"].get(name) != settings[name]]
    differ += [f"entrant {label!r}" for label in own if held["entrants"].get(label, own[label]) != own[label]]
    if differ:
        there = "; ".join(
            f"{name} is {held['settings'].get(name)!r} there and {settings[name]!r} here"
            for name in differ
            if name in settings
        )
        raise ValueError(
            f"'{folder}' holds a comparison with other arguments ({', '.join(differ)} differ"
            f"{': ' + there if there else ''}): give the same to go on with it, or another output_dir."
        )
    _write_settings(folder, {**held, "entrants": held["entrants"] | own, "environment": environment()})


def check_model(folder: Path, base: Any) -> None:
    path = folder / SETTINGS_JSON
    held = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name, weight in base.named_parameters() if weight.dim() == 2][:1]
    print_of = model_fingerprint(base, [name.rsplit(".", 1)[0] for name in names])
    found = json.loads(json.dumps({**print_of, "dtype": str(base.dtype)}))
    del found["name_or_path"]
    if held.setdefault("model", found) != found:
        raise ValueError(f"'{folder}' holds a comparison of another model: load the same, or give another output_dir.")
    _write_settings(folder, held)


def _write_settings(folder: Path, held: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(held, indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / SETTINGS_JSON, lambda target: target.write_text(text, encoding="utf-8"))


def environment() -> dict[str, str]:
    """Versions of what results depend on."""
    from ... import __version__

    names = ("torch", "transformers", "peft", "numpy")
    return {
        "peft-edit": __version__,
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
