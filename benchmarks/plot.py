"""The figure of docs/benchmarks.md, from the JSON files of search.py and lifelong.py.

    python benchmarks/plot.py --search float32=search.json bfloat16=search_bf16.json --lifelong lifelong.json \\
        --output docs/figures/speed.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


# Okabe and Ito's palette: told apart also by colour-blind readers.
COLOURS = {"published, mpes": "#999999", "published, none": "#555555", "adam": "#0072B2", "normalized": "#D55E00"}
LABELS = {
    "published, mpes": "published procedure, MPES",
    "published, none": "published MEMIT",
    "adam": "peft-edit, Adam",
    "normalized": "peft-edit, default",
}


def plot_search(axes: Any, files: dict[str, Path]) -> None:
    """Edits per second of each way, one group of bars for each file."""
    named: set[str] = set()
    for place, path in enumerate(files.values()):
        rows = json.loads(path.read_text())["rows"]
        for shift, row in enumerate(rows):
            speed, way = 1 / row["seconds_per_edit"], row["way"]
            height = place + 0.21 * (shift - (len(rows) - 1) / 2)
            axes.barh(height, speed, height=0.2, color=COLOURS[way], label=None if way in named else LABELS[way])
            named.add(way)
            axes.text(speed, height, f" {speed:.2g}", va="center", fontsize=7)
    axes.set_yticks(range(len(files)), list(files), fontsize=7)
    axes.set(xlabel="edits per second (log)", xscale="log")
    axes.set_xlim(right=axes.get_xlim()[1] * 2)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncol=1)


def plot_lifelong(axes: Any, path: Path) -> None:
    """Edits per second of CPU time in each group of facts."""
    groups = json.loads(path.read_text())["groups"]
    speed = [group["facts"] / group["cpu_seconds"] for group in groups]
    axes.plot([group["until"] for group in groups], speed, marker="o", markersize=3, color=COLOURS["normalized"])
    axes.set(xlabel="facts edited", ylabel="edits per CPU second", ylim=(0, 1.2 * max(speed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", nargs="+", required=True, help="NAME=FILE")
    parser.add_argument("--lifelong", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("speed.svg"))
    args = parser.parse_args()
    files = {name: Path(file) for name, _, file in (pair.partition("=") for pair in args.search)}
    figure = Figure(figsize=(7.0, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_search(left, files)
    plot_lifelong(right, args.lifelong)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
