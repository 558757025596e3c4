"""Figures: they show the numbers given, fit a column, and leave matplotlib's global state alone."""

import importlib.util
import io
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch

from peft_edit import EditReport
from peft_edit.analysis import (
    Contributions,
    Tracing,
    locate_layers,
    plot_contributions,
    plot_norms,
    plot_tracing,
    plots,
)
from peft_edit.analysis.plots import OKABE_ITO
from peft_edit.report import ModuleReport


matplotlib = pytest.importorskip("matplotlib")
FigureCanvasAgg = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg

NORMS = [
    {f"model.layers.{layer}.mlp.down_proj": 0.01 * (layer + 1) * batch for layer in (4, 5)} for batch in (1, 2, 3)
]


def tracing(**changes) -> Tracing:
    nan = float("nan")
    effects = [[0.1, 0.2, 0.3], [nan] * 3, [0.5, 0.4, -0.1], [0.0] * 3, [nan] * 3, [0.1, 0.6, 0.7]]
    settings = dict(
        effects={"hidden": effects, "mlp": effects}, facts=[2, 0, 3, 3, 0, 3], clean=0.9, corrupted=0.1, window=1
    )
    return Tracing(**{**settings, "samples": 2, "noise": 0.3, **changes})


def drawn_inside(figure) -> bool:
    """Whether all that is drawn lies within the figure, in inches."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    drawn, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
    return drawn.x0 > -0.01 and drawn.y0 > -0.01 and drawn.x1 < width + 0.01 and drawn.y1 < height + 0.01


def test_norms_show_each_module_and_the_budget() -> None:
    figure = plot_norms(NORMS, budget=0.2)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["layer 4", "layer 5", "budget"]
    assert lines["layer 5"].get_ydata() == pytest.approx([6, 12, 18])
    assert list(lines["layer 5"].get_xdata()) == [1, 2, 3]
    assert set(lines["budget"].get_ydata()) == {20.0}
    assert [line.get_color() for line in axes.lines[:2]] == list(OKABE_ITO[:2])
    assert figure.get_size_inches()[0] == pytest.approx(3.3)
    assert drawn_inside(figure)
    assert "budget" not in [line.get_label() for line in plot_norms(NORMS).axes[0].lines]


def test_norms_of_a_report_bring_their_budget() -> None:
    name = "model.layers.4.mlp.down_proj"
    module = ModuleReport(name, 1.0, 0.1, 0.15, 1.0, 1.0, False)
    figure = plot_norms(EditReport(modules=[module], norms=NORMS))
    assert set(figure.axes[0].lines[-1].get_ydata()) == {15.0}
    assert set(plot_norms(EditReport(modules=[module], norms=NORMS), budget=0.3).axes[0].lines[-1].get_ydata()) == {
        30.0
    }


def test_norms_name_modules_that_a_layer_does_not_tell_apart() -> None:
    names = ["model.layers.4.mlp.down_proj", "model.layers.4.mlp.up_proj"]
    figure = plot_norms([dict.fromkeys(names, 0.1)])
    assert [line.get_label() for line in figure.axes[0].lines] == names
    assert drawn_inside(figure)
    assert plot_norms([{"head": 0.1}]).axes[0].lines[0].get_label() == "head"


def test_norms_of_many_modules_are_all_told_apart() -> None:
    figure = plot_norms([{f"layers.{layer}.mlp": 0.1 + layer for layer in range(12)}])
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(styles) == 12 and drawn_inside(figure)


def test_plots_go_into_given_axes() -> None:
    figure = matplotlib.figure.Figure()
    left, right = figure.subplots(1, 2)
    assert plot_norms(NORMS, ax=left) is figure
    assert plot_contributions(Contributions([0.1], [0.2], [0.0], [1.0], 1), ax=right) is figure
    assert left.lines and right.lines


def test_contributions_show_both_states() -> None:
    after = Contributions([0.1, 0.2], [0.5, 0.6], [0.3, 0.0], [1.0, 2.0], 7)
    before = Contributions([0.1, 0.1], [0.4, 0.5], [0.0, 0.0], [1.0, 2.0], 7)
    figure = plot_contributions(after, before)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert list(lines) == ["attention", "attention, before", "MLP", "MLP, before", "edit"]
    assert lines["MLP"] == pytest.approx([50, 60]) and lines["MLP, before"] == pytest.approx([40, 50])
    assert lines["edit"][0] == pytest.approx(30) and lines["edit"][1] != lines["edit"][1]  # layer 1 is not edited
    assert drawn_inside(figure)
    assert "edit" not in [line.get_label() for line in plot_contributions(before).axes[0].lines]
    with pytest.raises(ValueError, match="2 and 1 layers"):
        plot_contributions(after, Contributions([0.1], [0.1], [0.0], [1.0], 1))


def test_tracing_shows_the_positions_that_there_are() -> None:
    figure = plot_tracing(tracing(window=3))
    hidden, mlp = [axes for axes in figure.axes if axes.images]
    assert hidden.get_title() == "hidden state restored"
    assert mlp.get_title() == "MLP output restored, windows of 3 layers"
    assert [label.get_text() for label in hidden.get_yticklabels()] == [
        "first subject token",
        "last subject token",
        "first subsequent token",
        "last token",
    ]
    shown = torch.as_tensor(hidden.images[0].get_array().filled())
    torch.testing.assert_close(shown[1], torch.tensor([0.5, 0.4, -0.1], dtype=shown.dtype))
    assert hidden.images[0].get_cmap().name == "viridis"
    assert hidden.images[0].get_clim() == (-0.1, 0.7)
    assert drawn_inside(figure)
    assert len(plot_tracing(tracing(), kinds=["mlp"]).axes) == 2  # the map and its colour bar


def test_a_located_model_is_plotted(tiny, facts) -> None:
    model, tokenizer = tiny
    report = locate_layers(model, tokenizer, facts[:3], samples=1)
    image = report.plot().axes[0].images[0].get_array()
    assert image.shape == (6, 5)
    assert float(image[5, 4]) == pytest.approx(report.tracing.effects["hidden"][5][4])
    with pytest.raises(ValueError, match="no tracing to plot"):
        locate_layers(model, tokenizer, facts[:3], tracing=False).plot()


def test_nothing_to_plot_is_said() -> None:
    for empty in ([], [{}], EditReport()):
        with pytest.raises(ValueError, match="no norms to plot"):
            plot_norms(empty)
    with pytest.raises(ValueError, match=r"no tracing of \['attention'\]"):
        plot_tracing(tracing(), kinds=["attention"])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_norms(NORMS, budget=0.2),
        lambda: EditReport(norms=NORMS).plot(),
        lambda: plot_contributions(Contributions([0.1], [0.2], [0.3], [1.0], 1)),
        lambda: plot_tracing(tracing()),
    ],
    ids=["norms", "report", "contributions", "tracing"],
)
def test_a_notebook_shows_the_figure(draw, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    figure = draw()
    header = figure._repr_png_()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", header[16:]) == tuple(int(200 * inches) for inches in figure.get_size_inches())
    assert "matplotlib.pyplot" not in sys.modules
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(header)
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, _ = formatters.DisplayFormatter().format(figure)  # what a kernel does with the value of a cell
    assert shown["image/png"].startswith(header)


def test_pyplot_and_settings_are_left_alone(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = matplotlib.rcParams.copy()  # a plain dict of it would choose a backend
    figures = [
        plot_norms(NORMS, budget=0.2),
        plot_contributions(Contributions([0.1], [0.2], [0.3], [1.0], 1)),
        plot_tracing(tracing()),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO())
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_matplotlib_is_imported_to_plot_only(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    again = importlib.util.module_from_spec(plots.__spec__)
    plots.__spec__.loader.exec_module(again)
    with pytest.raises(ImportError, match=r"pip install 'peft-edit\[plots\]'"):
        again.plot_norms(NORMS)


@pytest.fixture
def demo():
    path = Path(__file__).resolve().parents[1] / "examples" / "gradio_demo.py"
    spec = importlib.util.spec_from_file_location("gradio_demo", path)
    module = sys.modules["gradio_demo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gradio_demo"]


def test_the_demos_desk_edits_shows_and_undoes(demo) -> None:
    """Without gradio: what its buttons call."""
    desk = demo.load_desk(None, None, norm_budget=0.5)
    assert desk.table() == [] and desk.figure() is None
    assert desk.undo("").message == "There is no edit to undo."
    subject, prompt, target = demo.EXAMPLE
    asked = desk.ask(subject, prompt)
    assert (asked.before, asked.after) == ("Sweden", "Sweden")
    edited = desk.edit(subject, prompt, target)
    assert (edited.before, edited.after) == ("Sweden", "Norway") and edited.message.startswith("Written in")
    assert desk.edit("Germanischer Lloyd SE", "Germanischer Lloyd SE's headquarters are in", "Oslo").after == "Oslo"
    assert [row[2:] for row in desk.table()] == [["Oslo", "Hamburg"], ["Norway", "Sweden"]]
    assert "holds no fact 'nope'" in desk.undo("nope").message
    assert desk.undo(desk.table()[1][0]).after == "Sweden"
    assert [row[2] for row in desk.table()] == ["Oslo"]
    (line, budget) = desk.figure().axes[0].lines
    first, both, left = line.get_ydata()
    assert first < both > left > 0 and set(budget.get_ydata()) == {50.0}


def test_the_demo_says_what_is_wrong(demo, monkeypatch) -> None:
    desk = demo.EditingDesk(None, None)
    assert desk.edit("", "{} is", "a").message == "Nothing was changed. The subject is empty: fill it in."
    assert desk.edit("Ada", "Ben is", "a").message.endswith("Put {} once into the prompt, where the subject stands.")
    assert "prompt is empty" in desk.ask("Ada", " ").message
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="pip install gradio matplotlib"):
        demo.build_page(desk, "")
