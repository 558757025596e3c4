"""The lifelong comparison: methods and regularisers over the same stream of facts, scored as they go, beside the base.

`compare_methods` can be killed at any point and called again; it goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from peft import get_peft_model

from ...adapter import check_counts
from ...collecting import SAMPLED_PER_INPUT, collect_statistics, sample_texts
from ...facts import Fact, FactLike
from ...files import replace_file
from ...statistics import STATISTICS_JSON, KeyStatistics
from ..downstream_tasks import DownstreamTask
from ..scores import KINDS
from .entrants import Entrant, as_entrants
from .report import check_plots, write_report
from .results import Comparison
from .run import Load, RunFiles, editing_order, run_entrant, write_lines
from .scoring import (
    Measurement,
    Plan,
    finite,
    known,
    limited_threads,
    make_row,
    measure,
    measurement_from_dict,
    measurement_to_dict,
)
from .setup import (
    check_model,
    described,
    digest_of_statistics,
    downstream_tasks,
    edited_facts,
    enter,
    environment,
    points_apart,
    unedited_pairs,
)


BASE_JSON, ROWS_JSONL = "base.json", "rows.jsonl"
MEASURED = (*KINDS, "recall")


def compare_methods(
    load: Load,
    facts: Iterable[FactLike] | str,
    entrants: Iterable[str | Entrant],
    *,
    output_dir: str | os.PathLike,
    unedited: Sequence[Fact | tuple[str, str]],
    edits: int | None = None,
    batch_size: int = 100,
    seeds: Sequence[int] = (0,),
    text: str | Sequence[str] | None = None,
    statistics: KeyStatistics | Sequence[str] | None = None,
    downstream: str | os.PathLike | Sequence[DownstreamTask] | None = None,
    downstream_shots: int = 4,
    downstream_limit: int | None = None,
    score_every: int | None = None,
    save_steps: int = 1,
    workers: int = 1,
    threads: int = 1,
    figures: bool = True,
    progress: bool = True,
) -> Comparison:
    """Has every entrant edit the same facts, scores them as they go beside the unedited base, and writes a report.

    Writes to `output_dir`: `rows.jsonl`, `table.csv`, `report.html`, `figures/`, and for every run its last adapter.
    Killed at any point and called again with the same arguments it goes on; what is scored is not scored again. The
    same directory takes more entrants and seeds later.

    Args:
        load: Gives the unedited model, in eval mode, and its tokenizer. Called for every run, as a run changes the
            model. With `workers` > 1 it has to be a function of a module, so that other processes can import it.
        facts: As for `EditModel.edit_facts`, each with `target_true`.
        entrants: `Entrant` objects or words such as `"memit+mpes"`; see `parse_entrant`.
        output_dir (`str`): The comparison's directory.
        unedited: Facts (with `target_true`) or (prompt, answer) pairs that no edit is about.
        edits (`int`, *optional*): How many of the facts are edited, the first ones; by default all.
        batch_size (`int`): Facts per batch, for every entrant.
        seeds (`Sequence[int]`): Each shuffles the facts and seeds the adapter.
        text (*optional*): Ordinary text (one or several), for the perplexity.
        statistics (*optional*): Key statistics of the model, or texts to collect them from, for all entrants; by
            default from samples of the model itself.
        downstream (*optional*): A folder with `<task>.jsonl` files, see `load_task`, or tasks with their examples.
        downstream_shots (`int`), downstream_limit (`int`, *optional*): See `downstream_scores`.
        score_every (`int`, *optional*): Edits between two scoring points, whole batches; by default about a tenth.
        save_steps (`int`): Batches between two checkpoints.
        workers (`int`): Processes in which entrants run side by side, each with its own model.
        threads (`int`): Threads of torch in each process. With the same number the rows are the same, whatever
            `workers` is (apart from seconds).
        figures (`bool`): Draw figures; needs matplotlib.
        progress (`bool`): Print a line after each scoring point.

    Raises:
        ValueError: if an argument does not fit, or the directory holds a comparison with other ones; names which.
        ImportError: if figures are wanted and matplotlib is not installed; before anything is run.
    """
    if figures:
        check_plots()
    chosen = as_entrants(entrants)
    check_counts(batch_size=(batch_size, 1), save_steps=(save_steps, 1), workers=(workers, 1), threads=(threads, 1))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}.")
    edited = edited_facts(facts, edits)
    plan = Plan(
        facts=tuple(edited),
        unedited=unedited_pairs(unedited, edited),
        text=text if text is None or isinstance(text, str) else tuple(text),
        tasks=tuple(downstream_tasks(downstream)),
        shots=downstream_shots,
        limit=downstream_limit,
        batch_size=batch_size,
        score_every=points_apart(score_every, batch_size, len(edited)),
        save_steps=save_steps,
        threads=threads,
        folder=Path(output_dir),
    )
    settings = {**described(plan), "statistics": digest_of_statistics(statistics)}
    enter(plan.folder, settings, chosen)
    base = _run_all(load, chosen, seeds, plan, statistics, workers, progress)
    comparison = _read(plan, chosen, seeds, base, settings)
    write_report(comparison, figures)
    return comparison


def _run_all(
    load: Load,
    entrants: Sequence[Entrant],
    seeds: Sequence[int],
    plan: Plan,
    statistics: KeyStatistics | Sequence[str] | None,
    workers: int,
    progress: bool,
) -> Measurement:
    """Whatever has not been done yet. Returns what the base does."""
    waiting = [(entrant, seed) for seed in seeds for entrant in entrants if not RunFiles(plan, entrant, seed).finished]
    path = plan.folder / BASE_JSON
    if not path.is_file() or waiting:
        with limited_threads(plan.threads):
            _prepare(load, [entrant for entrant, _ in waiting], plan, statistics)
    base = measurement_from_dict(json.loads(path.read_text(encoding="utf-8")))
    if workers == 1 or len(waiting) < 2:
        for entrant, seed in waiting:
            run_entrant(load, entrant, seed, plan, base, progress)
        return base
    with ProcessPoolExecutor(min(workers, len(waiting)), mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(run_entrant, load, entrant, seed, plan, base, progress) for entrant, seed in waiting]
        try:
            for run in runs:
                run.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return base


def _prepare(
    load: Load, entrants: Sequence[Entrant], plan: Plan, statistics: KeyStatistics | Sequence[str] | None
) -> None:
    """Checks the model, measures the base and makes the key statistics, each once for the directory."""
    base, tokenizer = load()
    check_model(plan.folder, base)
    path = plan.folder / BASE_JSON
    if not path.is_file():
        found = json.dumps(measurement_to_dict(measure(base, tokenizer, plan.facts, plan)), allow_nan=False)
        replace_file(path, lambda target: target.write_text(found + "\n", encoding="utf-8"))
    modules = _edited_modules(base, entrants)
    if not modules:
        return
    if (plan.statistics_folder / STATISTICS_JSON).is_file():
        held = KeyStatistics.load(plan.statistics_folder)
        if set(modules) <= set(held.second_moments):
            return
        modules = list(dict.fromkeys([*held.second_moments, *modules]))
    if isinstance(statistics, KeyStatistics):
        statistics.check(base, modules)
        made = statistics.subset(modules)
    else:
        widest = max(_inputs(base.get_submodule(name)) for name in modules)
        source = "texts given" if statistics is not None else "sampled from the model"
        texts = sample_texts(base, tokenizer, SAMPLED_PER_INPUT * widest, seed=0) if statistics is None else statistics
        made = collect_statistics(base, tokenizer, texts, modules, source=source)
    made.save(plan.statistics_folder)


def _edited_modules(base: Any, entrants: Sequence[Entrant]) -> list[str]:
    """Names of all modules that some entrant edits through an adapter."""
    names: dict[str, None] = {}
    for entrant in entrants:
        if not entrant.is_baseline:
            model = get_peft_model(base, entrant.config(0))
            names |= dict.fromkeys(model.edit_layers())
            model.unload()
    return list(names)


def _inputs(module: Any) -> int:
    """d_in, also of a `Conv1D`, whose weight is (d_in, d_out)."""
    return getattr(module, "in_features", None) or int(module.weight.shape[0])


def _read(
    plan: Plan, entrants: Sequence[Entrant], seeds: Sequence[int], base: Measurement, settings: dict[str, Any]
) -> Comparison:
    """All rows of these entrants and seeds; writes them to one file."""
    everything = list(range(len(plan.facts)))
    first: dict[str, Any] = {"label": "base", "method": "base", "regularisers": [], "seed": None, "edits": 0}
    first |= {"seconds_per_edit": None, "search_steps": None, "converged": None, "norms": {}, "stopped": None}
    rows = [first | make_row(base, base, everything)]
    finals = {"base": {kind: base.per_fact[kind] for kind in KINDS} | {"recall": base.recalled}}
    for entrant in entrants:
        ends = []
        for seed in seeds:
            held = RunFiles(plan, entrant, seed).rows
            rows += [held[edits] for edits in sorted(held)]
            last = held[max(held)]
            if last["stopped"] is None:
                ends.append(_by_place(last, editing_order(len(plan.facts), seed)))
        if len(ends) == len(seeds):
            finals[entrant.label] = {
                name: np.mean([values[name] for values in ends], axis=0).tolist() for name in MEASURED
            }
    rows = [{name: value for name, value in row.items() if name not in ("per_fact", "recalled")} for row in rows]
    write_lines(plan.folder / ROWS_JSONL, rows)
    about = finite({**settings, "seeds": list(seeds)})
    return Comparison(list(entrants), rows, finals, about, environment(), plan.folder)


def _by_place(row: dict[str, Any], places: Sequence[int]) -> dict[str, list[float]]:
    """Values of every fact in the order of the plan, whatever the order of editing."""
    found = {"recall": row["recalled"]}
    for kind in KINDS:
        values = np.empty(len(places))
        values[list(places)] = known(row["per_fact"][kind])
        found[kind] = values.tolist()
    return found
