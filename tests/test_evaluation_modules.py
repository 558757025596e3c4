"""The `evaluate` modules: numbers worked out by hand, the numbers of `score_edits`, loading from the package."""

import math
import sys
from pathlib import Path

import evaluate
import pytest

from peft_edit.evaluation.modules import MODULES, load_module, module_path
from peft_edit.evaluation.modules.efficacy import Efficacy
from peft_edit.evaluation.modules.token_accuracy import TokenAccuracy
from peft_edit.evaluation.scores import KINDS, prompts_of, score_edits, score_pairs
from peft_edit.evaluation.token_scores import token_accuracy
from peft_edit.prompts import PromptEncoder
from peft_edit.scoring import predict_targets

from .evaluation_run import noisy_tiny_model


@pytest.fixture
def load(tmp_path):
    return lambda name: load_module(name, cache_dir=str(tmp_path))


@pytest.fixture(scope="module")
def asked(facts):
    """A half-right model, facts, and what it thinks of their prompts."""
    model, tokenizer = noisy_tiny_model()
    chosen = facts[:12]
    rows = [(kind, place, text) for kind, prompts in prompts_of(chosen).items() for place, text in prompts]
    new = score_pairs(model, tokenizer, [(text, chosen[place].target) for _, place, text in rows], 128)
    true = score_pairs(model, tokenizer, [(text, chosen[place].target_true) for _, place, text in rows], 128)
    return model, tokenizer, chosen, rows, new.log_probability.tolist(), true.log_probability.tolist()


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_loaded_from_its_folder(name, load):
    path = Path(module_path(name))
    assert path.parent.parent.parent.name == "peft_edit" and (path / f"{name}.py").is_file()
    metric = load(name)
    assert isinstance(metric, evaluate.Metric) and metric.name == name
    assert "Returns:" in metric.inputs_description and metric.description and metric.citation


@pytest.mark.parametrize("name, expected", [("efficacy", 75), ("paraphrase", 75), ("neighborhood", 25)])
def test_success_and_magnitude_by_hand(load, name, expected):
    new = [math.log(value) for value in (0.6, 0.2, 0.5, 0.5)]
    true = [math.log(value) for value in (0.1, 0.3, 0.4, 0.1)]
    found = load(name).compute(predictions=new, references=true, groups=[7, 7, 3, 3])
    margin = ((0.5 - 0.1) / 2 + (0.1 + 0.4) / 2) / 2
    assert found[name] == expected and found["facts"] == 2
    assert found[f"{name}_magnitude"] == pytest.approx(100 * (-margin if name == "neighborhood" else margin))
    assert found[f"{name}_interval"] == ([0, 50] if name == "neighborhood" else [50, 100])
    assert load(name).compute(predictions=new, references=true)["facts"] == 4  # each a fact of its own


def test_edit_score_by_hand(load):
    found = load("edit_score").compute(
        predictions=[-1.0, -1.0, -5.0, -1.0, -1.0],
        references=[-3.0, -2.0, -1.0, -2.0, -0.5],
        kinds=["efficacy", "paraphrase", "neighborhood", "neighborhood", "efficacy"],
        groups=[0, 0, 0, 0, 1],
        resamples=40,
    )
    assert (found["efficacy"], found["paraphrase"], found["neighborhood"], found["facts"]) == (50, 100, 50, 2)
    assert found["score"] == pytest.approx(3 / (1 / 50 + 1 / 100 + 1 / 50))
    # A resample has the first fact once, twice (S 75), or not at all (no S).
    assert found["score_interval"] == pytest.approx([60, 75])
    alone = load("edit_score").compute(predictions=[-1.0], references=[-2.0], kinds=["efficacy"], groups=[4])
    assert alone["efficacy"] == 100 and math.isnan(alone["score"])


def test_token_accuracy_by_hand(load):
    found = load("token_accuracy").compute(
        predictions=[[5, 7], [3], [1, 2, 3, 4]], references=[[5, 8], [3], [1, 2, 3, 9]], groups=[0, 0, 1]
    )
    assert found["token_accuracy"] == pytest.approx(75) and found["token_accuracy_interval"] == [75, 75]
    assert found["facts"] == 2


def test_modules_give_the_numbers_of_score_edits(load, asked):
    model, tokenizer, chosen, rows, new, true = asked
    settings = {"confidence": 0.8, "resamples": 60, "seed": 5}
    expected = score_edits(model, tokenizer, chosen, **settings)
    assert 0 < expected.efficacy < 100
    names = [f"{kind}{end}" for kind in KINDS for end in ("", "_magnitude")]
    found = load("edit_score").compute(
        predictions=new,
        references=true,
        kinds=[kind for kind, _, _ in rows],
        groups=[place for _, place, _ in rows],
        **settings,
    )
    for name in [*names, "score"]:
        assert found[name] == pytest.approx(getattr(expected, name), abs=1e-3)
        assert found[f"{name}_interval"] == pytest.approx(expected.intervals[name], abs=1e-3)
    for kind in KINDS:
        metric = load(kind)
        own = [place for place, row in enumerate(rows) if row[0] == kind]
        for part in (own[:5], own[5:]):
            metric.add_batch(predictions=[new[place] for place in part], references=[true[place] for place in part])
        found = metric.compute(groups=[rows[place][1] for place in own], **settings)
        for name in (kind, f"{kind}_magnitude"):
            assert found[name] == pytest.approx(getattr(expected, name), abs=1e-3)
            assert found[f"{name}_interval"] == pytest.approx(expected.intervals[name], abs=1e-3)


def test_token_accuracy_is_that_of_the_function(load, asked):
    model, tokenizer, chosen, *_ = asked
    pairs = [(fact.filled_prompt, f"{fact.target_true} in {fact.target}") for fact in chosen]
    encoder = PromptEncoder(tokenizer, model.config.vocab_size)
    encoded = [encoder.continuation_ids(*pair) for pair in pairs]
    tokens = [found.tolist() for found in predict_targets(model, encoded)]
    found = load("token_accuracy").compute(predictions=tokens, references=[target for _, target in encoded])
    shares = token_accuracy(model, tokenizer, pairs)
    assert found["token_accuracy"] == pytest.approx(100 * sum(shares) / len(shares)) and 0 < max(shares)


def test_classes_can_be_imported(tmp_path):
    found = Efficacy(cache_dir=str(tmp_path)).compute(predictions=[-1.0, -2.0], references=[-3.0, -1.5])
    assert found["efficacy"] == 50 and found["efficacy_interval"] == [0, 100]
    found = TokenAccuracy(cache_dir=str(tmp_path)).compute(predictions=[[5, 7], [3]], references=[[5, 8], [3]])
    assert found["token_accuracy"] == 75


def test_errors_name_what_is_wrong(load, monkeypatch):
    one = {"predictions": [-1.0], "references": [-2.0]}
    with pytest.raises(ValueError, match="Unknown kinds of prompts .'rewrite'.: they are efficacy, paraphrase"):
        load("edit_score").compute(**one, kinds=["rewrite"], groups=[0])
    with pytest.raises(ValueError, match="1 predictions, 1 references, 1 kinds and 2 groups"):
        load("efficacy").compute(**one, groups=[0, 1])
    with pytest.raises(ValueError, match="Prompt 1 has 2 predicted tokens and 1 reference tokens"):
        load("token_accuracy").compute(predictions=[[1], [1, 2]], references=[[1], [1]])
    with pytest.raises(ValueError, match="There are 1 prompts and 2 groups"):
        load("token_accuracy").compute(predictions=[[1]], references=[[1]], groups=[0, 1])
    with pytest.raises(ValueError, match="no evaluation module 'rouge'; there are edit_score, efficacy"):
        load_module("rouge")
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-edit\[eval\]'"):
        load_module("efficacy")
