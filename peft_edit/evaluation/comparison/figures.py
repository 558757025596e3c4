"""Figures of a comparison, told apart with any colour vision: colours of Okabe and Ito, and a marker for each entrant.

Every function returns a `matplotlib.figure.Figure`, which a notebook shows where it is the value of a cell, or None
where there is nothing to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...analysis.contributions import PARTS
from ...analysis.plots import OKABE_ITO, STYLES, new_figure
from ...architectures import block_index
from .results import Comparison


LABEL_SIZE, TICK_SIZE = 9, 8
MARKERS = "osv^DXP*"
GREY = "#595959"


@dataclass(frozen=True)
class Drawing:
    """A figure that a report holds.

    Args:
        name (`str`): Of its files.
        title (`str`), caption (`str`): What it shows, and how to read it.
        draw: From a comparison to the figure.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Comparison], Any]


def draw_scores(comparison: Comparison) -> Any:
    """S of the edited facts, recall of the unedited ones and perplexity, against edits."""
    panels: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
        ("S of edited facts (%)", lambda row: _first(row.get("scores", {}).get("score"))),
        ("recall of unedited facts (%)", lambda row: _first(row.get("recall"))),
    ]
    if comparison.base["perplexity"] is not None:
        panels.append(("perplexity", lambda row: row.get("perplexity")))
    figure, grid = _grid(len(panels), 3)
    labels = [each.label for each in comparison.entrants]
    for axes, (title, value) in zip(grid, panels):
        # On S the base is another one at each point, as it is of the facts edited so far.
        before = None if title.startswith("S ") else value(comparison.base)
        _lines(axes, comparison, labels, value, before)
        _label(axes, "edits", title)
    _spread_axis(grid[-1] if comparison.base["perplexity"] is not None else None)
    _legend(figure)
    return figure


def draw_norms(comparison: Comparison) -> Any:
    """||Δ||_F of each edited module, against edits (Figure 1 of arXiv 2502.01636)."""
    modules = dict.fromkeys(name for row in comparison.rows for name in row["norms"] if _is_edited(comparison, name))
    if not modules:
        return None
    figure, grid = _grid(len(modules), 3)
    labels = [each.label for each in comparison.entrants]
    for axes, module in zip(grid, modules):
        _lines(axes, comparison, labels, partial(_norm, module), 0.0)
        _label(axes, "edits", r"$\|\Delta\|_F$ in % of $\|W_0\|_F$")
        axes.set_title(_module_title(module), fontsize=LABEL_SIZE)
        _spread_axis(axes, floor=True)
    _legend(figure)
    return figure


def draw_downstream_early_stopping(comparison: Comparison) -> Any:
    """Downstream F1 with MPES or LTI, against edits (Figure 3 of arXiv 2502.01636)."""
    return _downstream(comparison, lambda traits: not traits or traits <= {"mpes", "lti"})


def draw_downstream_norm(comparison: Comparison) -> Any:
    """Downstream F1 with MPES and the norm constraint, against edits (Figure 5 of arXiv 2502.01636)."""
    return _downstream(comparison, lambda traits: not traits or "norm" in traits)


def draw_contributions(comparison: Comparison) -> Any:
    """Shares of attention, MLP and edits in the residual stream after the last edit (Figure 4 of the same paper)."""
    before = comparison.base["contributions"]
    finals = {each.label: comparison.final_rows(each.label)[0].get("contributions") for each in comparison.entrants}
    shown = {label: found for label, found in finals.items() if found is not None}
    if before is None or not shown:
        return None
    figure, grid = _grid(len(shown), 3, share_y=True)
    names = {"attention": "attention", "mlp": "MLP (with edits)", "edit": "edits"}
    for axes, (label, after) in zip(grid, shown.items()):
        for part, color, marker in zip(PARTS, OKABE_ITO, MARKERS):
            layers = range(len(after[part]))
            style = {"color": color, "marker": marker, "markersize": 3.5}
            axes.plot(layers, [100 * share for share in after[part]], linewidth=1.3, label=names[part], **style)
            if part != "edit":
                shares = [100 * share for share in before[part]]
                dashed = {"linestyle": "--", "markerfacecolor": "white", "linewidth": 0.9}
                axes.plot(layers, shares, label=f"{part if part == 'attention' else 'MLP'}, base", **style, **dashed)
        axes.set_ylim(0, None)
        _whole_numbers(axes)
        _label(axes, "layer", "% of residual stream" if axes in grid[::3] else "")
        axes.set_title(shortened([label])[0], fontsize=LABEL_SIZE)
    _legend(figure)
    return figure


def draw_trade_off(comparison: Comparison) -> Any:
    """Efficacy against neighborhood and against recall of unedited facts, after the last edit."""
    figure, grid = _grid(2, 2)
    sides = (("neighborhood", "NS, neighbours kept (%)"), ("recall", "recall of unedited facts (%)"))
    for axes, (across, title) in zip(grid, sides):
        for place, label in enumerate(["base", *(each.label for each in comparison.entrants)]):
            found = comparison.final_estimates(label)
            if not found or math.isnan(found[across].value) or math.isnan(found["efficacy"].value):
                continue
            x, y = found[across], found["efficacy"]
            color, marker, _ = (GREY, "*", "-") if label == "base" else _style(place - 1)
            axes.errorbar(
                x.value,
                y.value,
                xerr=[[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]],
                yerr=[[max(0.0, y.value - y.low)], [max(0.0, y.high - y.value)]],
                color=color,
                marker=marker,
                markersize=6,
                linewidth=0.9,
                linestyle="none",
                label="base (unedited)" if label == "base" else label,
            )
        axes.set_xlim(-4, 104)
        axes.set_ylim(-4, 104)
        _label(axes, title, "ES, edits in place (%)")
    _legend(figure)
    return figure


def draw_seconds(comparison: Comparison) -> Any:
    """Seconds that an edit took, without scores; mean over the whole run, and against edits."""
    labels = [each.label for each in comparison.entrants]
    known = [(label, comparison.mean_over_edits(label, "seconds_per_edit")) for label in labels]
    means = {label: mean for label, mean in known if mean is not None}
    if not means:
        return None
    figure, (bars, lines) = _grid(2, 2, height=max(2.4, 0.6 + 0.26 * len(means)))
    for place, (label, mean) in enumerate(means.items()):
        bars.barh(place, mean, color=_style(labels.index(label))[0], height=0.62)
        steps = comparison.mean_over_edits(label, "search_steps")
        note = f" {mean:.3g} s" + ("" if steps is None else f", {steps:.1f} steps")
        bars.text(mean, place, note, va="center", fontsize=TICK_SIZE)
    bars.set_yticks(range(len(means)), shortened(list(means)))
    bars.invert_yaxis()
    bars.set_xlim(0, 1.55 * max(means.values()))
    _label(bars, "seconds per edit", "")
    _lines(lines, comparison, labels, lambda row: row["seconds_per_edit"] if row["edits"] else None, None)
    lines.set_ylim(0, None)
    _label(lines, "edits", "seconds per edit")
    _legend(figure)
    return figure


DRAWINGS: Sequence[Drawing] = (
    Drawing(
        "scores",
        "Edited facts, unedited facts, ordinary text",
        "Left: harmonic mean S of efficacy, paraphrase and neighborhood over the facts edited so far. Middle: share "
        "of prompts on facts never edited that are still answered right. Right: perplexity on ordinary text.",
        draw_scores,
    ),
    Drawing(
        "norms",
        "Growth of the norm of the change",
        "Frobenius norm of what has been added to each edited weight, as a share of that weight's own norm.",
        draw_norms,
    ),
    Drawing(
        "downstream_early_stopping",
        "Downstream tasks with early stopping or LTI",
        "Weighted F1, its mean over tasks first, of methods as they are (dashed) and with MPES or LTI (solid).",
        draw_downstream_early_stopping,
    ),
    Drawing(
        "downstream_norm",
        "Downstream tasks with the norm constraint",
        "Weighted F1, its mean over tasks first, of methods as they are (dashed) and with the constraint (solid).",
        draw_downstream_norm,
    ),
    Drawing(
        "contributions",
        "Parts of the residual stream",
        "Norm of what attention, MLP and edits add at each layer, as a share of the norm of the layer's output, after "
        "the last edit. Dashed: the unedited base. A model in decline shows edits that make up most of the stream.",
        draw_contributions,
    ),
    Drawing(
        "trade_off",
        "Efficacy against what is kept",
        "After the last edit; the best place is the upper right corner. Bars are 95 % bootstrap intervals.",
        draw_trade_off,
    ),
    Drawing(
        "seconds",
        "Seconds per edit",
        "Wall-clock time of editing alone, without scores and checkpoints: left over the whole run, right since the "
        "point before. Steps are those of the target search per fact; of baselines, optimiser steps per batch.",
        draw_seconds,
    ),
)


def _downstream(comparison: Comparison, belongs: Callable[[frozenset[str]], bool]) -> Any:
    chosen = [each for each in comparison.entrants if belongs(each.traits)]
    tasks = list(comparison.base["downstream"])
    if not tasks or not any(each.traits for each in chosen):
        return None
    columns = ["mean", *tasks] if len(tasks) > 1 else tasks
    figure, grid = _grid(len(columns), 4 if len(columns) > 3 else 3, height=1.9)
    dashed = {each.label: "-" if each.traits else (0, (4, 2)) for each in chosen}

    def f1(task: str, row: dict[str, Any]) -> float | None:
        found = row.get("downstream") or {}
        if task != "mean":
            return found[task]["f1"] if found else None
        return sum(each["f1"] for each in found.values()) / len(found) if found else None

    for axes, task in zip(grid, columns):
        _lines(
            axes,
            comparison,
            [each.label for each in chosen],
            partial(f1, task),
            f1(task, comparison.base),
            dashed,
        )
        axes.set_ylim(0, 100)
        axes.set_title("mean of tasks" if task == "mean" else task, fontsize=LABEL_SIZE)
        _label(axes, "edits", "F1 (%)" if axes in grid[::4] else "")
    _legend(figure)
    return figure


def _lines(
    axes: Any,
    comparison: Comparison,
    labels: Sequence[str],
    value: Callable[[dict[str, Any]], float | None],
    before: float | None,
    styles: Mapping[str, Any] | None = None,
) -> None:
    """A line for each entrant: the mean over seeds at each point, a band from the least to the most of them.

    Args:
        before (`float`, *optional*): The base's value: where lines begin, and a dotted line.
    """
    everyone = [each.label for each in comparison.entrants]
    for label in labels:
        found: dict[int, list[float]] = {} if before is None else {0: [before]}
        for row in comparison.rows_of(label):
            number = value(row)
            if number is not None:
                found.setdefault(row["edits"], []).append(number)
        if not found:
            continue
        color, marker, line = _style(everyone.index(label))
        points = sorted(found)
        line = (styles or {}).get(label, line)
        means = [sum(found[point]) / len(found[point]) for point in points]
        axes.plot(
            points, means, color=color, marker=marker, markersize=3.5, linewidth=1.3, linestyle=line, label=label
        )
        if any(len(found[point]) > 1 for point in points):
            lows, highs = ([end(found[point]) for point in points] for end in (min, max))
            axes.fill_between(points, lows, highs, color=color, alpha=0.15, linewidth=0)
    if before:
        axes.axhline(before, color=GREY, linestyle=":", linewidth=1.1, label="base (unedited)")


def _is_edited(comparison: Comparison, module: str) -> bool:
    """Whether an entrant other than a LoRA, which changes nearly every module, edits it."""
    others = [each.label for each in comparison.entrants if each.method != "lora"]
    return any(module in row["norms"] for label in others for row in comparison.rows_of(label))


def _style(place: int) -> tuple[str, str, Any]:
    return (
        OKABE_ITO[place % len(OKABE_ITO)],
        MARKERS[place % len(MARKERS)],
        STYLES[place // len(OKABE_ITO) % len(STYLES)],
    )


def _first(values: Sequence[float | None] | None) -> float | None:
    return None if values is None else values[0]


def _norm(module: str, row: dict[str, Any]) -> float | None:
    """In percent."""
    return 100 * row["norms"][module] if module in row["norms"] else None


def _module_title(name: str) -> str:
    try:
        return f"layer {block_index(name)}, {name.rsplit('.', 1)[-1]}"
    except ValueError:
        return name


def _grid(count: int, columns: int, height: float = 2.3, share_y: bool = False) -> tuple[Any, list[Any]]:
    """A figure with room for `count` axes and a legend above them, outside pyplot's global state."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(height * rows + 0.45, width=max(3.6, 2.75 * columns), dpi=150)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=LABEL_SIZE)
    axes.set_ylabel(y, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=TICK_SIZE)
    axes.spines[["top", "right"]].set_visible(False)


def _spread_axis(axes: Any, floor: bool = False) -> None:
    """A logarithmic scale where values lie far apart; else, with `floor`, one from 0."""
    if axes is None:
        return
    values = [y for line in axes.lines for y in line.get_ydata() if y and y > 0]
    if values and max(values) > 30 * min(values):
        axes.set_yscale("log")
    elif floor:
        axes.set_ylim(0, None)


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def shortened(labels: Sequence[str], width: int = 26) -> list[str]:
    """Labels that fit in a figure; one that was cut is numbered if others begin like it."""
    short = [label if len(label) <= width else label[: width - 1] + "…" for label in labels]
    return [text if short.count(text) == 1 else f"{text} ({place + 1})" for place, text in enumerate(short)]


def _legend(figure: Any) -> None:
    """Above all axes, where it hides nothing."""
    handles = {label: handle for each in figure.axes for handle, label in zip(*each.get_legend_handles_labels())}
    labels = shortened(list(handles))
    columns = (4 if figure.get_figwidth() > 5 else 2) // (2 if max(map(len, labels), default=0) > 16 else 1)
    figure.legend(
        handles.values(),
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=TICK_SIZE,
        handlelength=3,
    )
