"""The report of a comparison: a table, figures, and one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from ...files import replace_file
from ..bootstrap import Estimate
from ..scores import KINDS
from .figures import DRAWINGS
from .results import Comparison


TABLE_CSV, REPORT_HTML, FIGURES = "table.csv", "report.html", "figures"
METADATA = ("Date", "Creator", "Format", "Type")  # that matplotlib writes into an SVG unless told not to

# Name in table.csv, heading, decimals, what it is.
COLUMNS: Sequence[tuple[str, str, int, str]] = (
    ("label", "entrant", 0, "Method, then the regularisers added to it."),
    ("edits", "edits", 0, "Facts edited when scored; fewer than asked for where the method could not go on."),
    ("efficacy", "ES", 1, "Edited prompts on which the new answer is more probable than the true one, %."),
    ("paraphrase", "PS", 1, "The same on other phrasings of the edited facts, %."),
    ("neighborhood", "NS", 1, "Prompts on neighbouring subjects on which the true answer stays more probable, %."),
    ("score", "S", 1, "Harmonic mean of ES, PS and NS."),
    ("first_tenth", "S, first tenth", 1, "S of the tenth of the facts that was edited first."),
    ("last_tenth", "S, last tenth", 1, "S of the tenth of the facts that was edited last."),
    ("recall", "recall", 1, "Prompts on facts that were never edited which are greedily answered right, %."),
    ("perplexity", "perplexity", 2, "Of ordinary text; exp of the mean negative log-likelihood per token."),
    ("norm", "‖Δ‖ / ‖W‖", 1, "Frobenius norm of the change, % of the weight's; the largest over modules."),
    ("f1", "F1", 1, "Weighted F1, mean over the downstream tasks, %."),
    ("seconds_per_edit", "s / edit", 3, "Wall-clock seconds of editing alone, per fact."),
    ("search_steps", "steps", 1, "Steps of the target search per fact; of baselines, optimiser steps per batch."),
    ("converged", "converged", 1, "Facts whose search ended with the target most probable in every context, %."),
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 0.55rem; border-bottom: 1px solid #d0d0d0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
.sortable th { cursor: pointer; } .sortable th:hover { text-decoration: underline; }
th[aria-sort="ascending"]::after { content: " ▲"; } th[aria-sort="descending"]::after { content: " ▼"; }
td small { color: #555; display: block; font-size: 0.75rem; }
tr.base td { background: #f1f1f1; } tr.best td { font-weight: 600; } tr.best td small { font-weight: 400; }
figure { margin: 1.2rem 0 2rem; } figcaption { color: #333; max-width: 46rem; font-size: 0.9rem; }
svg { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1.2rem; font-size: 0.9rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
"""

SORTING = """
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.rows[0].querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const falling = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value;
    const numbers = column > 0;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (!x || !y) return !x - !y;
      return (numbers ? x - y : x.localeCompare(y)) * (falling ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  }));
"""


def check_plots() -> None:
    """Whether figures can be drawn.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'peft-edit[plots]', or pass figures=False.") from error


def table_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The table: the base, then every entrant after its last edit, over all seeds.

    Returns:
        `list[dict]`: by the names of `COLUMNS`, numbers, or `Estimate`s where there is an interval; None where there
        is nothing. And `"stopped"`: why an entrant stopped before the end, else None.
    """
    return [_table_row(comparison, label) for label in ("base", *(each.label for each in comparison.entrants))]


def summary(comparison: Comparison) -> str:
    """The table as plain text."""
    rows = table_rows(comparison)
    shown = [column for column in COLUMNS if any(row[column[0]] is not None for row in rows)]
    cells = [[heading for _, heading, _, _ in shown]]
    cells += [[_text(row[name], decimals) for name, _, decimals, _ in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(row_of))
        for row_of in ([*zip(row, widths)] for row in cells)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write_report(comparison: Comparison, figures: bool = True) -> None:
    """Writes `table.csv`, the figures (PNG and SVG) and `report.html` to the comparison's folder.

    Args:
        comparison (`Comparison`): What was found.
        figures (`bool`): Draw figures; needs matplotlib.
    """
    _write(comparison.folder / TABLE_CSV, table_csv(comparison))
    drawn = write_figures(comparison) if figures else {}
    _write(comparison.folder / REPORT_HTML, html_report(comparison, drawn))


def table_csv(comparison: Comparison) -> str:
    """The table with intervals in columns of their own, `<name>_low` and `<name>_high`."""
    names = ["label", "edits"]
    for name in (column[0] for column in COLUMNS[2:]):
        names += [name, f"{name}_low", f"{name}_high"] if name in (*KINDS, "score", "recall") else [name]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*names, "stopped"], lineterminator="\n")
    writer.writeheader()
    for row in table_rows(comparison):
        flat: dict[str, Any] = {}
        for name, value in row.items():
            ends = (
                {"": value.value, "_low": value.low, "_high": value.high}
                if isinstance(value, Estimate)
                else {"": value}
            )
            flat |= {name + end: number for end, number in ends.items()}
        writer.writerow({name: value for name, value in flat.items() if name in [*names, "stopped"]})
    return file.getvalue()


def write_figures(comparison: Comparison) -> dict[str, str]:
    """Draws what there is to draw into `figures/`. Returns the SVG of each figure by its name."""
    import matplotlib

    folder = comparison.folder / FIGURES
    folder.mkdir(exist_ok=True)
    drawn = {}
    for drawing in DRAWINGS:
        figure = drawing.draw(comparison)
        paths = [folder / f"{drawing.name}.{kind}" for kind in ("png", "svg")]
        if figure is None:
            for path in paths:  # of a call with other entrants
                path.unlink(missing_ok=True)
            continue
        replace_file(paths[0], partial(figure.savefig, format="png"))
        # Text stays text, and the same figure gives the same file.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": drawing.name}):
            replace_file(paths[1], partial(figure.savefig, format="svg", metadata=dict.fromkeys(METADATA)))
        drawn[drawing.name] = paths[1].read_text(encoding="utf-8")
    return drawn


def html_report(comparison: Comparison, drawn: dict[str, str]) -> str:
    """One page without any outside resource: table, differences, figures, definitions, settings.

    Args:
        comparison (`Comparison`): What was found.
        drawn (`dict[str, str]`): SVG by the names in `DRAWINGS`.
    """
    settings = comparison.settings
    seeds = len(settings["seeds"])
    best = comparison.best
    sections = [
        f"<h1>{len(comparison.entrants)} ways to edit {settings['edits']} facts</h1>",
        f"<p>Batches of {settings['batch_size']}, {seeds} {'seed' if seeds == 1 else 'seeds'}, scored every "
        f"{settings['score_every']} edits. "
        + (
            f"Highest S after the last edit: <strong>{escape(best)}</strong>."
            if best
            else "No entrant came to the end."
        )
        + "</p>",
        "<h2>After the last edit</h2>",
        _html_table(comparison),
        *_html_stopped(comparison),
        *_html_differences(comparison),
    ]
    for drawing in DRAWINGS:
        if drawing.name in drawn:
            svg = inline_svg(drawn[drawing.name], drawing.name, drawing.title)
            sections += [f"<h2>{escape(drawing.title)}</h2>", f"<figure>{svg}", _caption(drawing.caption, seeds)]
    about = {heading: text for _, heading, _, text in COLUMNS}
    entrants = {each.label: _described(each) for each in comparison.entrants}
    for title, entries in (
        ("Definitions", about),
        ("Entrants", entrants),
        ("Settings", settings),
        ("Environment", comparison.environment),
    ):
        sections += [f"<h2>{title}</h2>", _definitions(entries)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Lifelong editing: a comparison</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + f"\n<script>{SORTING}</script>\n</body>\n</html>\n"
    )


def inline_svg(svg: str, name: str, title: str) -> str:
    """An SVG file as a part of a page: without prologue and metadata, its ids unlike those of other figures."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def _table_row(comparison: Comparison, label: str) -> dict[str, Any]:
    last = comparison.final_rows(label)
    worst = min(last, key=lambda row: row["edits"])
    same = [row for row in last if row["edits"] == worst["edits"]]
    tasks = [row["downstream"].values() for row in same if row.get("downstream")]
    found = comparison.final_estimates(label)
    return {
        "label": label,
        "edits": worst["edits"],
        **{name: found.get(name) for name in (*KINDS, "score")},
        **{
            f"{part}_tenth": _mean([row["tenths"][part]["score"][0] for row in same if "tenths" in row])
            for part in ("first", "last")
        },
        "recall": found.get("recall"),
        "perplexity": _mean([row.get("perplexity") for row in same]),
        "norm": _mean([100 * max(row["norms"].values()) for row in same if row["norms"]]),
        "f1": _mean([sum(task["f1"] for task in each) / len(each) for each in tasks]),
        "seconds_per_edit": comparison.mean_over_edits(label, "seconds_per_edit"),
        "search_steps": comparison.mean_over_edits(label, "search_steps"),
        "converged": _percent(comparison.mean_over_edits(label, "converged")),
        "stopped": worst["stopped"],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _text(value: Any, decimals: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, Estimate):
        return f"{value.value:.{decimals}f} [{value.low:.{decimals}f}, {value.high:.{decimals}f}]"
    return f"{value:.{decimals}f}"


def _html_table(comparison: Comparison) -> str:
    rows = table_rows(comparison)
    shown = [column for column in COLUMNS if any(row[column[0]] is not None for row in rows)]
    head = "".join(f'<th title="{escape(about, quote=True)}">{heading}</th>' for _, heading, _, about in shown)
    body = []
    for row in rows:
        kind = {"base": "base", comparison.best: "best"}.get(row["label"], "")
        cells = "".join(_html_cell(row[name], decimals) for name, _, decimals, _ in shown)
        body.append(f'<tr class="{kind}">{cells}</tr>')
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        "<p><small>In brackets: 95 % bootstrap intervals, resampled over facts (prompts). A click on a heading sorts."
        "</small></p>"
    )


def _html_cell(value: Any, decimals: int) -> str:
    if isinstance(value, Estimate) and not math.isnan(value.value):
        interval = f"[{value.low:.{decimals}f}, {value.high:.{decimals}f}]"
        return f'<td data-value="{value.value}">{value.value:.{decimals}f}<small>{interval}</small></td>'
    if value is None or isinstance(value, Estimate):
        return '<td data-value="">–</td>'
    return f'<td data-value="{escape(str(value), quote=True)}">{escape(_text(value, decimals))}</td>'


def _html_stopped(comparison: Comparison) -> list[str]:
    stopped = [
        f"<li><strong>{escape(row['label'])}</strong>, seed {row['seed']}, after {row['edits']} edits: "
        f"{escape(row['stopped'])}</li>"
        for row in comparison.rows
        if row["stopped"]
    ]
    return ["<h2>Stopped before the end</h2>", f"<ul>{''.join(stopped)}</ul>"] if stopped else []


def _html_differences(comparison: Comparison) -> list[str]:
    found = comparison.differences()
    if not found:
        return []
    rows = "".join(
        f'<tr><td data-value="{escape(label, quote=True)}">{escape(label)}</td>'
        + "".join(_html_cell(each[name], 1) + f"<td>{_verdict(each[name])}</td>" for name in ("score", "recall"))
        + "</tr>"
        for label, each in found.items()
    )
    best = escape(comparison.best or "")
    return [
        f"<h2>{best} against each other one</h2>",
        f'<div class="scroll"><table><thead><tr><th>{best} minus</th><th>S</th><th></th><th>recall of unedited facts'
        f"</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>"
        "<p><small>Paired: both are worked out on the same resampled facts (prompts). An interval without 0 says that "
        "the two differ.</small></p>",
    ]


def _verdict(difference: Estimate) -> str:
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no clear difference"


def _caption(text: str, seeds: int) -> str:
    more = " Lines are means over seeds, bands go from the lowest to the highest." if seeds > 1 else ""
    return f"<figcaption>{escape(text + more)}</figcaption></figure>"


def _described(entrant: Any) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in entrant.settings.items())
    return entrant.method + (f" with {settings}" if settings else "")


def _definitions(entries: dict[str, Any]) -> str:
    lines = []
    for name, value in entries.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {each}" for key, each in value.items()) or "none"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        lines.append(f"<dt>{escape(str(name))}</dt><dd>{escape('none' if value is None else str(value))}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


def _write(path: Path, text: str) -> None:
    replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))
