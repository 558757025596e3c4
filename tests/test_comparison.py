"""The lifelong comparison: rows beside the base, going on after an interruption, processes, report and figures."""

import json
import re
import shutil
import struct
from html.parser import HTMLParser
from importlib.metadata import version

import pytest
import torch
from peft import PeftModel

from peft_edit.baselines import FineTuning
from peft_edit.evaluation import perplexity, recall, score_edits
from peft_edit.evaluation.bootstrap import Estimate, estimate_differences
from peft_edit.evaluation.comparison import Comparison, Entrant, compare_methods, parse_entrant, summary
from peft_edit.evaluation.comparison import run as running
from peft_edit.evaluation.comparison.entrants import as_entrants
from peft_edit.evaluation.comparison.figures import DRAWINGS, shortened
from peft_edit.evaluation.comparison.report import table_rows
from peft_edit.evaluation.comparison.run import editing_order
from peft_edit.evaluation.downstream_tasks import DownstreamTask, Example
from peft_edit.evaluation.scores import KINDS
from peft_edit.tiny import load_tiny_facts, load_tiny_model


ENTRANTS = ("memit+search_steps=4+num_contexts=1", "encore+search_steps=4+num_contexts=1", "ft+steps=3")
MEMIT, ENCORE, FT = ENTRANTS
FACTS = load_tiny_facts()
EDITED, KEPT = FACTS[:20], FACTS[20:32]
TEXTS = [f"{fact.filled_prompt} {fact.target_true}." for fact in FACTS[32:200]]
CITY = DownstreamTask(
    "city",
    ("Rome", "Paris"),
    examples=tuple(Example(f"{fact.filled_prompt}", place % 2) for place, fact in enumerate(KEPT)),
)


def compare(folder, entrants=ENTRANTS, load=load_tiny_model, **changes) -> Comparison:
    settings = {
        "unedited": KEPT,
        "batch_size": 10,
        "score_every": 10,
        "text": TEXTS[:5],
        "statistics": TEXTS,
        "downstream": [CITY],
        "downstream_shots": 0,
        "figures": False,
        "progress": False,
    }
    return compare_methods(load, EDITED, entrants, output_dir=folder, **settings | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Comparison:
    """Three entrants that ran through, with figures."""
    return compare(tmp_path_factory.mktemp("whole"), figures=True)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds_per_edit"} for row in rows]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_point_has_a_row_beside_the_base(whole):
    rows = lines(whole.folder / "rows.jsonl")
    assert rows == whole.rows
    expected = [("base", None, 0)] + [(label, 0, edits) for label in ENTRANTS for edits in (10, 20)]
    assert [(row["label"], row["seed"], row["edits"]) for row in rows] == expected
    for row in rows[1:]:
        value, low, high = row["scores"]["score"]
        es, ps, ns = (row["scores"][kind][0] for kind in KINDS)
        assert value == pytest.approx(0 if 0 in (es, ps, ns) else 3 / (1 / es + 1 / ps + 1 / ns))
        assert low <= value <= high
        assert row["seconds_per_edit"] > 0
        assert row["search_steps"] <= 4
        assert set(row["tenths"]) == {"first", "middle", "last"}
        assert len(row["contributions"]["mlp"]) == len(row["contributions"]["attention"]) == 5
        assert set(row["downstream"]) == {"city"}
        assert (row["converged"] is None) == (row["label"] == FT)
        assert 0 < row["norms"]["model.layers.0.mlp.down_proj"]
        assert row["base"]["recall"][0] == 100.0 and row["base"]["scores"]["efficacy"][0] < 20
    edits = {row["label"]: row["contributions"]["edit"][0] for row in rows if row["edits"] == 20}
    assert edits[MEMIT] > 0 and edits[ENCORE] > 0 and edits[FT] == 0


def test_the_base_row_is_what_the_unedited_model_does(whole):
    model, tokenizer = load_tiny_model()
    scores = score_edits(model, tokenizer, EDITED)
    row = whole.base
    for name in (*KINDS, "score", "neighborhood_accuracy"):
        assert row["scores"][name] == pytest.approx(list(scores.estimate(name)))
    pairs = [(fact.filled_prompt, fact.target_true) for fact in KEPT]
    assert row["recall"][0] == pytest.approx(recall(model, tokenizer, pairs))
    assert row["perplexity"] == pytest.approx(perplexity(model, tokenizer, TEXTS[:5]), rel=1e-5)
    assert row["norms"] == {} and row["contributions"]["edit"] == [0.0] * 5


def test_the_last_row_is_what_the_last_adapter_does(whole):
    base, tokenizer = load_tiny_model()
    adapter = whole.folder / "runs" / f"{ENCORE}-seed0" / "checkpoints" / "checkpoint-20"
    model = PeftModel.from_pretrained(base, adapter).eval()
    order = editing_order(20, 0)
    assert sorted(order) == list(range(20)) != order
    assert [record.subject for record in model.edited_facts()] == [EDITED[place].subject for place in order]
    scores = score_edits(model, tokenizer, EDITED)  # in the order given, not of editing
    for kind in KINDS:
        assert whole.finals[ENCORE][kind] == pytest.approx(scores.per_fact[kind])
    [row] = whole.final_rows(ENCORE)
    assert row["scores"]["score"][0] == pytest.approx(scores.score)
    for name, layer in model.edit_layers().items():
        weight = layer.get_base_layer().weight
        assert row["norms"][name] == pytest.approx(float(layer.get_delta("default").norm() / weight.norm()), rel=1e-4)
    [first] = score_edits(model, tokenizer, [EDITED[place] for place in order[:2]]).estimate("efficacy")[:1]
    assert row["tenths"]["first"]["efficacy"][0] == pytest.approx(first)


def test_the_best_is_compared_with_each_other_one(whole):
    scores = {label: whole.final_estimates(label)["score"].value for label in ENTRANTS}
    assert whole.best == max(scores, key=scores.get)
    found = whole.differences()
    assert set(found) == {"base", *ENTRANTS} - {whole.best}
    best, base = ({kind: whole.finals[label][kind] for kind in KINDS} for label in (whole.best, "base"))
    assert found["base"]["score"] == estimate_differences(best, base, KINDS)["score"]
    kept, all_kept = (whole.finals[label]["recall"] for label in (whole.best, "base"))
    assert found["base"]["recall"].value == pytest.approx((sum(kept) - sum(all_kept)) / 12)


class Interrupted(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize(("label", "measured_before"), [(ENCORE, 1), (FT, 0)])
def test_after_an_interruption_it_ends_with_the_same_rows(whole, tmp_path, monkeypatch, label, measured_before):
    real, calls = running.measure, []

    def measure(model, tokenizer, facts, plan):
        calls.append(len(facts))
        if len(calls) == measured_before + 1:
            raise Interrupted
        return real(model, tokenizer, facts, plan)

    monkeypatch.setattr(running, "measure", measure)
    with pytest.raises(Interrupted):
        compare(tmp_path, [label])
    again = compare(tmp_path, [label])
    expected = [10, 20, 20] if measured_before else [10, 10, 20]  # what has a row is not asked again
    assert calls == expected
    assert without_seconds(again.rows) == without_seconds([whole.base, *whole.rows_of(label)])
    compare(tmp_path, [label])
    assert calls == expected


def test_a_checkpoint_whose_row_is_lost_is_not_gone_on_from(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "copy")
    (tmp_path / "copy" / "runs" / f"{FT}-seed0" / "rows.jsonl").unlink()
    again = compare(tmp_path / "copy")
    assert without_seconds(again.rows) == without_seconds(whole.rows)


def test_processes_give_the_same_rows(whole, tmp_path):
    again = compare(tmp_path, [ENCORE, FT], workers=2)
    expected = [whole.base, *whole.rows_of(ENCORE), *whole.rows_of(FT)]
    assert without_seconds(again.rows) == without_seconds(expected)


def test_entrants_and_seeds_can_be_added(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "copy")
    more = compare(tmp_path / "copy", [FT, "ft+steps=2"], seeds=(0, 7))
    assert [row["seed"] for row in more.rows_of(FT)] == [0, 0, 7, 7]
    assert without_seconds(more.rows_of(FT)[:2]) == without_seconds(whole.rows_of(FT))
    means = [sum(row["scores"]["efficacy"][0] for row in more.final_rows(FT)) / 2]
    assert [more.final_estimates(FT)["efficacy"].value] == pytest.approx(means)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_every": 20}, "score_every is 10 there and 20 here"),
        ({"edits": 10}, "facts, edits differ"),
        ({"text": TEXTS[:4]}, "text differ"),
        ({"statistics": TEXTS[:100]}, "statistics differ"),
        ({"entrants": [Entrant(FT, "ft", {"steps": 9})]}, "entrant 'ft[+]steps=3' differ"),
    ],
)
def test_other_arguments_are_refused(whole, changes, message):
    before = (whole.folder / "settings.json").read_text()
    with pytest.raises(ValueError, match=f"holds a comparison with other arguments.*{message}"):
        compare(whole.folder, **changes)
    assert (whole.folder / "settings.json").read_text() == before


def load_other_model():
    model, tokenizer = load_tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    return model, tokenizer


def test_another_model_is_refused(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "copy")
    with pytest.raises(ValueError, match="holds a comparison of another model"):
        compare(tmp_path / "copy", load=load_other_model, seeds=(1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_every": 15}, "multiple of 10, got 15"),
        ({"edits": 21}, "There are 20 facts, fewer than the 21"),
        ({"unedited": FACTS[19:22]}, "is among the edited and the unedited facts"),
        ({"unedited": []}, "hold some back"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"workers": 0}, "workers must be a whole number >= 1"),
        ({"downstream": "nowhere"}, "holds none of sst2.jsonl"),
        ({"entrants": []}, "nothing to compare"),
        ({"entrants": "memit"}, "as a list"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_an_entrant_that_cannot_go_on_stops_alone(tmp_path, monkeypatch):
    real, calls = FineTuning.edit_facts, []

    def failing(self, facts, batch_size):
        calls.append(batch_size)
        if len(calls) == 2:
            raise ValueError("the loss is not <finite>")
        return real(self, facts, batch_size)

    monkeypatch.setattr(FineTuning, "edit_facts", failing)
    found = compare(tmp_path, [FT, "ft+steps=1"])
    assert [(row["edits"], row["stopped"]) for row in found.rows_of(FT)] == [(10, "the loss is not <finite>")]
    assert "scores" in found.rows_of(FT)[0] and found.best == "ft+steps=1"
    assert FT not in found.differences() and {row["label"]: row["edits"] for row in table_rows(found)}[FT] == 10
    assert "the loss is not &lt;finite&gt;" in (tmp_path / "report.html").read_text()
    compare(tmp_path, [FT, "ft+steps=1"])
    assert len(calls) == 4


class Page(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    def __init__(self):
        super().__init__()
        self.links, self.ids, self.open, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br", "link"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_holds_every_label(whole):
    text = (whole.folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links and all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids)) and {link[1:] for link in page.links} <= set(page.ids)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert page.tags.count("svg") == len(list((whole.folder / "figures").glob("*.svg")))
    for label in ("base", *ENTRANTS):
        assert f">{label}</td>" in text
    assert "Frobenius norm" in text and version("torch") in text and "score_every" in text


def test_figures_are_drawn(whole):
    from matplotlib import image

    names = {path.stem for path in (whole.folder / "figures").glob("*.png")}
    assert names == {"scores", "norms", "downstream_norm", "contributions", "trade_off", "seconds"}
    for name in names:
        pixels = image.imread(whole.folder / "figures" / f"{name}.png")[..., :3]
        colours = {tuple(colour) for colour in (pixels[::2, ::2].reshape(-1, 3) * 255).astype(int)}
        assert len(colours) > 20 and min(pixels.shape[:2]) > 200
        drawn = (whole.folder / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        if name not in ("contributions", "downstream_norm"):
            assert all(label in drawn for label in shortened(ENTRANTS))
        assert "nan" not in drawn.lower()


def test_a_notebook_shows_the_figures(whole):
    drawn = {drawing.name: figure for drawing in DRAWINGS if (figure := drawing.draw(whole)) is not None}
    assert set(drawn) == {path.stem for path in (whole.folder / "figures").glob("*.png")}
    for figure in drawn.values():
        header = figure._repr_png_()[:24]
        assert header.startswith(b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">II", header[16:]) == tuple(int(150 * inches) for inches in figure.get_size_inches())


def test_the_table_is_text_and_csv(whole):
    rows = table_rows(whole)
    assert [row["label"] for row in rows] == ["base", *ENTRANTS]
    assert isinstance(rows[1]["score"], Estimate)
    head, first = (whole.folder / "table.csv").read_text().splitlines()[:2]
    assert dict(zip(head.split(","), first.split(",")))["recall"] == "100.0"
    assert all(label in summary(whole) for label in ENTRANTS)


def row(label, seed, edits, seconds):
    return {"label": label, "seed": seed, "edits": edits, "seconds_per_edit": seconds}


def test_means_weigh_every_edit_the_same(tmp_path):
    rows = [row("a", 0, 10, 1.0), row("a", 0, 40, 2.0), row("a", 1, 10, 3.0), row("b", 0, 10, None)]
    found = Comparison([], rows, {}, {}, {}, tmp_path)
    assert found.mean_over_edits("a", "seconds_per_edit") == pytest.approx((10 * 1 + 30 * 2 + 10 * 3) / 50)
    assert found.mean_over_edits("b", "seconds_per_edit") is None


def test_entrants_are_read_from_words():
    assert parse_entrant("memit") == Entrant("memit", "memit")
    both = parse_entrant("memit+mpes+norm")
    assert both.settings == {"early_stopping": "mpes", "norm_penalty": "auto"} and both.traits == {"mpes", "norm"}
    assert both.config(3).seed == 3 and both.config(3).early_stopping == "mpes" and both.config(3).refinements == 0
    assert parse_entrant("alphaedit+lti").config(0).lti is True
    assert parse_entrant("memit+nas").config(0).value_norm == "anchored"
    assert parse_entrant("encore").traits == {"mpes", "norm"}
    assert parse_entrant("emmet + norm_budget=0.5 + layers_to_transform=[0, 1]").settings == {
        "norm_budget": 0.5,
        "layers_to_transform": [0, 1],
    }
    assert parse_entrant("lora+lr=0.01").is_baseline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grace", "no method 'grace'.*memit.*ft, lora"),
        ("", "needs a label"),
        ("memit+mpse", "no regulariser 'mpse' in 'memit[+]mpse'; there are mpes, norm, lti, nas"),
        ("memit+norm_budgets=1", "no setting 'norm_budgets'"),
        ("memit+norm_budget=-1", "'memit[+]norm_budget=-1': norm_budget must be"),
        ("memit+norm+norm_penalty=3", "sets 'norm_penalty' twice"),
        ("ft+mpes", "takes no 'mpes'"),
        ("ft+seed=1", "no setting 'seed'"),
    ],
)
def test_words_that_are_no_entrant(text, message):
    with pytest.raises(ValueError, match=message):
        parse_entrant(text)


def test_labels_differ():
    with pytest.raises(ValueError, match="Two entrants are called 'memit'"):
        as_entrants(["memit", Entrant("memit", "encore")])
    with pytest.raises(ValueError, match="not that of the unedited base"):
        Entrant("base", "memit")


def test_long_labels_fit_in_a_figure():
    long = ["memit+mpes+preservation_weight=41", "memit+mpes+preservation_weight=42", "encore"]
    assert shortened(long, 12) == ["memit+mpes+… (1)", "memit+mpes+… (2)", "encore"]
