"""Figures for papers and notebooks: one column wide, colour-blind safe, and without pyplot's global state.

Every function returns a `matplotlib.figure.Figure`; `figure.savefig("norms.pdf")` writes it, and a notebook shows it
where it is the value of a cell.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..architectures import block_index
from .contributions import PARTS, Contributions


if TYPE_CHECKING:
    from .locating import LocateReport
    from .tracing import Tracing

# Okabe and Ito, "Color universal design" (2008): told apart with any colour vision.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
COLUMN_INCHES = 3.3
LABEL_SIZE, TICK_SIZE = 8, 7
KIND_NAMES = {"hidden": "hidden state", "mlp": "MLP output"}


def plot_norms(report_or_norms: Any, budget: float | None = None, ax: Any = None) -> Any:
    """||Delta||_F of each edited module after each batch, against the budget.

    Args:
        report_or_norms: An `EditReport`, or its `norms`: after each batch, module name to share of ||W0||_F.
        budget (`float`, *optional*): The largest share allowed, drawn as a line; by default that of the report.
        ax (*optional*): Axes to draw into.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ValueError: if there is no batch to show.
    """
    norms = list(getattr(report_or_norms, "norms", report_or_norms))
    if not norms or not norms[-1]:
        raise ValueError("There are no norms to plot: nothing has been edited, or the report is of an empty call.")
    if budget is None:
        budgets = [module.budget for module in getattr(report_or_norms, "modules", [])]
        budget = next((value for value in budgets if value is not None), None)
    figure, axes = _axes(ax, height=2.2)
    batches = range(1, len(norms) + 1)
    names = list(norms[-1])
    for place, name in enumerate(names):
        axes.plot(
            batches,
            [100 * shares.get(name, math.nan) for shares in norms],
            color=OKABE_ITO[place % len(OKABE_ITO)],
            linestyle=STYLES[place // len(OKABE_ITO) % len(STYLES)],
            marker="o",
            markersize=3 if len(norms) <= 30 else 0,
            linewidth=1.2,
            label=_module_label(name, names),
        )
    if budget is not None:
        axes.axhline(100 * budget, color="black", linestyle=(0, (4, 2)), linewidth=1, label="budget")
    axes.set_ylim(0, None)
    _label(axes, "batches edited", r"$\|\Delta\|_F$ in % of $\|W_0\|_F$")
    _whole_numbers(axes.xaxis)
    _legend(axes)
    return figure


def plot_contributions(after: Contributions, before: Contributions | None = None, ax: Any = None) -> Any:
    """What attention, MLP and edits add to the residual stream of each layer, after and before edits.

    Args:
        after (`Contributions`): Of the edited model.
        before (`Contributions`, *optional*): Of the same model unedited, drawn dashed.
        ax (*optional*): Axes to draw into.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ValueError: if the two are of models of different depth.
    """
    if before is not None and len(before.mlp) != len(after.mlp):
        raise ValueError(f"The two models have {len(after.mlp)} and {len(before.mlp)} layers and cannot be compared.")
    figure, axes = _axes(ax, height=2.4)
    layers = range(len(after.mlp))
    names = {"attention": "attention", "mlp": "MLP", "edit": "edit"}
    for part, color, marker in zip(PARTS, OKABE_ITO, "sov"):
        shares = [100 * share for share in getattr(after, part)]
        if part == "edit":
            if not any(shares):
                continue
            shares = [share or math.nan for share in shares]
        axes.plot(layers, shares, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=names[part])
        if before is not None and part != "edit":
            earlier = [100 * share for share in getattr(before, part)]
            label = f"{names[part]}, before"
            style = {"linestyle": "--", "markerfacecolor": "white", "linewidth": 0.9}
            axes.plot(layers, earlier, color=color, marker=marker, markersize=3.5, label=label, **style)
    axes.set_ylim(0, None)
    _label(axes, "layer", "norm in % of residual stream")
    _whole_numbers(axes.xaxis)
    _legend(axes)
    return figure


def plot_tracing(report: LocateReport | Tracing, kinds: Sequence[str] | None = None) -> Any:
    """Heat maps of a causal tracing: position classes by layers, one map for each kind of state.

    Args:
        report: What `locate_layers` returns, or its `tracing`.
        kinds (`Sequence[str]`, *optional*): Kinds of states to show; by default all that were traced.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ValueError: if the report has no tracing, or not of that kind.
    """
    tracing: Any = getattr(report, "tracing", report)
    if tracing is None:
        raise ValueError("The report has no tracing to plot: no fact was known, or locate_layers had tracing=False.")
    kinds = list(tracing.effects) if kinds is None else list(kinds)
    missing = [kind for kind in kinds if kind not in tracing.effects]
    if missing or not kinds:
        raise ValueError(f"There is no tracing of {missing}; there is one of {list(tracing.effects)}.")
    figure = new_figure(height=0.45 + 1.45 * len(kinds))
    grid = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
    for axes, kind in zip(grid, kinds):
        _heat_map(figure, axes, tracing, kind)
    grid[-1].set_xlabel("layer", fontsize=LABEL_SIZE)
    return figure


def _heat_map(figure: Any, axes: Any, tracing: Any, kind: str) -> None:
    import matplotlib

    rows = [place for place, facts in enumerate(tracing.facts) if facts]
    effects = [tracing.effects[kind][place] for place in rows]
    colors = matplotlib.colormaps["viridis"].copy()
    colors.set_bad("lightgray")
    least, most = min(min(row) for row in effects), max(max(row) for row in effects)
    image = axes.imshow(effects, cmap=colors, aspect="auto", vmin=min(0.0, least), vmax=most, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [tracing.positions[place] for place in rows])
    window = f", windows of {tracing.window} layers" if kind == "mlp" and tracing.window > 1 else ""
    axes.set_title(f"{KIND_NAMES.get(kind, kind)} restored{window}", fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=TICK_SIZE, length=2)
    _whole_numbers(axes.xaxis)
    bar = figure.colorbar(image, ax=axes, fraction=0.08, pad=0.03)
    bar.set_label("indirect effect", fontsize=TICK_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE, length=2)


def new_figure(height: float, width: float = COLUMN_INCHES, dpi: int = 200) -> Any:
    """A figure outside pyplot, one column wide unless told, sizes in inches.

    IPython draws the figures of pyplot's backend alone; others show themselves by a `_repr_png_` of their own.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'peft-edit[plots]'.") from error
    figure: Any = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    figure._repr_png_ = partial(_png, figure)
    return figure


def _png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _axes(ax: Any, height: float) -> tuple[Any, Any]:
    if ax is not None:
        return ax.get_figure(), ax
    figure = new_figure(height)
    return figure, figure.subplots()


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=LABEL_SIZE)
    axes.set_ylabel(y, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=TICK_SIZE)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing."""
    longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
    axes.legend(
        frameon=False,
        fontsize=TICK_SIZE,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=4 if longest <= 7 else 3 if longest <= 17 else 1,
        borderaxespad=0.2,
        columnspacing=1.0,
        handlelength=1.8,
    )


def _module_label(name: str, names: Sequence[str]) -> str:
    """ "layer 5" where that says which module is meant, else the module's own name."""
    try:
        layers = [block_index(other) for other in names]
        return f"layer {block_index(name)}" if len(set(layers)) == len(names) else name
    except ValueError:
        return name
