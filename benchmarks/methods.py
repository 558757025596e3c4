"""Every method on the same stream of edits into the bundled tiny model.

    python benchmarks/methods.py --output methods.json                      # the methods, as their presets are
    python benchmarks/methods.py --sweep --output sweep.json                # settings of some of them

`--facts` CounterFact facts in sequence, in batches of `--batch-size` (ROME: one by one). The other facts that the
model knows are what must be kept; their true sentences are the text for the key statistics. Every row starts from the
same model and sees the same facts. "memit, λp = d_in / 25" and its like are the presets with a preservation weight
that fits this narrow layer. Seconds include the statistics; CPU seconds are those of this process, which other work on
the machine does not lengthen. Prints a table and writes JSON after each row; rows that the file holds already are not
run again.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import get_peft_model

from peft_edit import EditConfig, EditModel, Fact
from peft_edit.baselines import BaselineReport, FineTuning, LoraTraining
from peft_edit.evaluation import recall, score_edits
from peft_edit.methods import METHODS
from peft_edit.tiny import load_tiny_facts, load_tiny_model


FITTED = {"preservation_weight": 41.0}  # d_in / 25
MPES = {"early_stopping": "mpes", "search_optimizer": "normalized"}
BASELINES: dict[str, Callable[..., Any]] = {"ft": FineTuning, "lora": LoraTraining}

Setting = tuple[str, dict[str, Any]]  # method, fields of its config that differ


def rule(**settings: float) -> dict[str, Any]:
    """Settings of the update rule."""
    return {"update_settings": settings}


METHOD_ROWS: dict[str, Setting] = {
    **{name: (name, {}) for name in METHODS},
    "ft": ("ft", {}),
    "lora": ("lora", {}),
    **{f"{name}, λp = d_in / 25": (name, FITTED) for name in ("memit", "memit-forgetful", "rect", "prune")},
}
SWEEP_ROWS: dict[str, Setting] = {
    **{f"alphaedit, threshold {t}": ("alphaedit", rule(threshold=t)) for t in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)},
    **{
        f"alphaedit + mpes, threshold {t}": ("alphaedit", {**rule(threshold=t), **MPES}) for t in (0.03, 0.1, 0.3, 1.0)
    },
    **{f"rect, share {s}, λp = d_in / 25": ("rect", {**rule(share=s), **FITTED}) for s in (0.2, 0.8)},
    "memit + mpes, λp = d_in / 25": ("memit", {**MPES, **FITTED}),
    **{
        f"prune + mpes, base {b}, λp = d_in / 25": ("prune", {**rule(base=b), **MPES, **FITTED})
        for b in (1.2, 2.0, 10.0)
    },
    **{f"ft, max_change {c}": ("ft", {"max_change": c}) for c in (0.1, 0.3, 0.5, 0.7, 1.0, None)},
    "ft, frobenius, max_change 0.5": ("ft", {"constraint": "frobenius"}),
    **{f"ft, moving ball, max_change {c}": ("ft", {"max_change": c, "cumulative": False}) for c in (0.1, 0.3)},
}


def edited(
    method: str, settings: dict[str, Any], facts: list[Fact], texts: list[str], batch: int
) -> tuple[Any, float]:
    """The model with the facts, and the largest ||Δ||_F / ||W0||_F of a changed matrix."""
    base, tokenizer = load_tiny_model()
    if method in BASELINES:
        baseline = BASELINES[method](base, tokenizer, **settings)
        report: BaselineReport = baseline.edit_facts(facts, batch)
        return baseline.model, max(report.norms[-1].values())
    config = EditConfig.from_method(method, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, config).eval()
    model.collect_statistics(texts, tokenizer)
    size = min(batch, config.update_rule().batch_size)
    return model, max(
        module.share for module in model.edit_facts(facts, tokenizer, batch_size=size, progress=False).modules
    )


def null_space_share(model: Any) -> float | None:
    """Share of a key's dimensions that AlphaEdit's projector keeps; None for another rule."""
    config = model.peft_config["default"] if hasattr(model, "peft_config") else None
    if getattr(config, "update", None) != "null_space":
        return None
    threshold = config.update_rule().threshold
    [moment] = config.memory.statistics.second_moments.values()
    eigenvalues = torch.linalg.eigvalsh(moment.double())
    return float((eigenvalues <= threshold * eigenvalues.mean()).double().mean())


def spectral_ratio(model: Any) -> float | None:
    """Largest singular value of the delta in units of W0's; None for a model without an edit adapter."""
    if not isinstance(getattr(model, "base_model", None), EditModel):
        return None
    [layer] = model.base_model.edit_layers().values()
    delta, base = (
        torch.linalg.matrix_norm(each.double(), 2) for each in (layer.get_delta("default"), layer.base_matrix())
    )
    return float(delta / base)


def measure(name: str, setting: Setting, facts: list[Fact], kept: Sequence[Fact], batch: int) -> dict[str, Any]:
    """One row."""
    method, settings = setting
    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in kept]
    wall, processor = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {"row": name, "method": method, "settings": settings}
    try:
        model, share = edited(method, settings, facts, texts, batch)
    except ValueError as error:
        return {**row, "error": str(error)}
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    _, tokenizer = load_tiny_model()
    return {
        **row,
        **score_edits(model, tokenizer, facts).to_dict(),
        "unedited_recall": recall(model, tokenizer, [(fact.filled_prompt, str(fact.target_true)) for fact in kept]),
        "norm_share": share,
        "spectral_ratio": spectral_ratio(model),
        "null_space_share": null_space_share(model),
        "seconds_per_edit": wall / len(facts),
        "cpu_seconds_per_edit": processor / len(facts),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    if "error" in row:
        return f"{row['row']:36s} {row['error']}"
    scores = "".join(f"{row[key]:7.1f}" for key in ("efficacy", "paraphrase", "neighborhood", "score"))
    return (
        f"{row['row']:36s}{scores}{row['unedited_recall']:10.1f}{row['norm_share']:8.2f}"
        f"{row['seconds_per_edit']:9.2f}{row['cpu_seconds_per_edit']:9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--sweep", action="store_true", help="settings of single methods instead of the methods")
    parser.add_argument("--only", nargs="*", help="rows to run; all by default")
    parser.add_argument("--output", type=Path, default=Path("methods.json"))
    args = parser.parse_args()

    table = SWEEP_ROWS if args.sweep else METHOD_ROWS
    unknown = sorted(set(args.only or ()) - set(table))
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; there are {list(table)}")
    known = load_tiny_facts()
    facts, kept = known[: args.facts], known[args.facts :]
    rows = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else []
    done = {row["row"] for row in rows}
    print(f"{'':36s}     ES     PS     NS      S  unedited  norm/W0   s/edit    CPU s", flush=True)
    for name in args.only or table:
        if name not in done:
            rows.append(measure(name, table[name], facts, kept, args.batch_size))
            args.output.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    for row in rows:
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
