"""Does the locator choose the right layers? Edits into every band of layers of the tiny model, beside its ranking.

    python benchmarks/layers.py --facts 60 --batch-size 30 --draws 3 --output layers.json

Every band sees the same facts, statistics and seed. A draw is another set of facts, on which the layers are edited,
and located, anew. Prints a table and writes JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import time

import torch
from peft import get_peft_model

from peft_edit import EditConfig, Fact, KeyStatistics, collect_statistics
from peft_edit.analysis import LocateReport, locate_layers
from peft_edit.architectures import find_blocks
from peft_edit.evaluation import score_edits
from peft_edit.tiny import load_tiny_facts, load_tiny_model


MEASURES = ("score", "gain", "traced")
SCORES = ("efficacy", "paraphrase", "neighborhood", "score")


def edit_band(layers: list[int], facts: list[Fact], statistics: KeyStatistics, batch_size: int) -> dict[str, float]:
    """Scores of the facts once they are written into some layers of a fresh model."""
    base, tokenizer = load_tiny_model()
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", layers_to_transform=layers)).eval()
    model.set_statistics(statistics)
    report = model.edit_facts(facts, tokenizer, batch_size=batch_size, progress=False)
    scores = score_edits(model, tokenizer, facts, resamples=10)
    found = {name: getattr(scores, name) for name in SCORES}
    return found | {
        "recalled": 100 * report.recalled / len(facts),
        "norm_share": max(module.share for module in report.modules),
    }


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's; equal values share their mean rank."""

    def ranks(values: list[float]) -> torch.Tensor:
        found = torch.tensor(values, dtype=torch.float64)
        below, equal = (found[:, None] > found).sum(1), (found[:, None] == found).sum(1)
        return below + (equal - 1) / 2

    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])


def mean_of(draws: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(draw[name] for draw in draws) / len(draws) for name in draws[0]}


def measures_of(report: LocateReport, layers: list[int]) -> dict[str, float]:
    """The locator's mean measures of a band."""
    return {
        f"located_{by}": {tuple(band): value for band, value in report.bands(len(layers), by)}[tuple(layers)]
        for by in MEASURES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=30)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--widest", type=int, default=3, help="layers in a band at most")
    parser.add_argument("--output", type=Path, default=Path("layers.json"))
    args = parser.parse_args()

    known = load_tiny_facts()
    base, tokenizer = load_tiny_model()
    depth = len(find_blocks(base)[1])
    modules = [name for name, _ in base.named_modules() if name.endswith("mlp.down_proj")]
    bands = [
        list(range(first, first + width)) for width in range(1, args.widest + 1) for first in range(depth - width + 1)
    ]
    results: dict[str, list[dict[str, float]]] = {str(band): [] for band in bands}
    reports, start = [], time.perf_counter()
    for draw in range(args.draws):
        facts = known[draw * args.facts : (draw + 1) * args.facts]
        kept = known[: draw * args.facts] + known[(draw + 1) * args.facts :]
        texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in kept]
        statistics = collect_statistics(base, tokenizer, texts, modules)
        report = locate_layers(base, tokenizer, facts)
        reports.append(report)
        print(report, flush=True)
        for band in bands:
            found = edit_band(band, facts, statistics, args.batch_size) | measures_of(report, band)
            results[str(band)].append(found)
            print(draw, band, {name: round(value, 2) for name, value in found.items()}, flush=True)

    rows = [{"layers": band, **mean_of(results[str(band)])} for band in bands]
    correlations = {
        by: rank_correlation([row["score"] for row in rows], [row[f"located_{by}"] for row in rows]) for by in MEASURES
    }
    print("\n| layers | ES | PS | NS | S | located: score | gain | traced |\n|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -row["score"]):
        cells = [f"{row[name]:.1f}" for name in SCORES] + [f"{row[f'located_{by}']:.2f}" for by in MEASURES]
        print(f"| {', '.join(map(str, row['layers']))} | {' | '.join(cells)} |")
    print("\nrank correlation with S:", {by: round(value, 2) for by, value in correlations.items()})
    summary = {
        "facts": args.facts,
        "batch_size": args.batch_size,
        "draws": args.draws,
        "bands": rows,
        "each_draw": results,
        "rank_correlation_with_score": correlations,
        "located": [report.to_dict() for report in reports],
        "seconds": time.perf_counter() - start,
    }
    args.output.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
