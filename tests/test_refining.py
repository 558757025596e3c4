"""Refined values: what the model does not answer yet is written further, what it does is left as it is."""

import math

import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig
from peft_edit.evaluation import recall
from peft_edit.prompts import PromptEncoder
from peft_edit.scoring import score_targets
from peft_edit.stopwatch import Stopwatch
from peft_edit.tiny import load_tiny_model


SUFFICIENT = 0.5


@pytest.fixture
def edited(tiny_statistics, facts):
    """A function that edits facts into a fresh tiny model."""

    def make(count=30, **settings):
        base, tokenizer = load_tiny_model()
        model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", num_contexts=2, **settings)).eval()
        model.set_statistics(tiny_statistics)
        report = model.edit_facts(facts[:count], tokenizer, progress=False)
        return model, tokenizer, report

    return make


def values(model):
    (stored,) = model.peft_config["default"].memory.values.values()
    return stored


def answered(model, tokenizer, facts):
    """Whether each target is the greedy completion, with a probability that is sufficient."""
    encoder = PromptEncoder(tokenizer, model.config.vocab_size, 256)
    rows = [encoder.encode_fact(fact, []).rows[0] for fact in facts]
    scores = score_targets(model, [(row.ids[: row.prompt_length], row.target_ids) for row in rows])
    return scores.greedy & (scores.log_probability >= math.log(SUFFICIENT))


def test_a_round_raises_the_values_of_converged_facts_that_are_not_answered(edited, facts):
    once, tokenizer, report = edited(refinements=0)
    converged = torch.tensor([fact.converged for fact in report.facts])
    enough = answered(once, tokenizer, facts[:30])
    expected = converged & ~enough
    assert expected.any() and (converged & enough).any() and not converged.all()  # or the test would show nothing
    twice, *_ = edited(refinements=1, sufficient_probability=SUFFICIENT)
    raised = (values(twice) - values(once)).norm(dim=1) > 1e-6 * values(once).norm(dim=1)
    assert torch.equal(raised, expected)
    # By what the first solution had left unwritten of them.
    (delta,) = (layer.get_delta("default") for layer in once.edit_layers().values())
    (keys,) = once.peft_config["default"].memory.keys.values()
    missing = values(once) - keys @ delta.T
    assert torch.allclose((values(twice) - values(once))[raised], missing[raised], rtol=1e-4, atol=1e-5)


def test_what_is_answered_is_left_alone_and_more_is_kept(edited, facts):
    known = [(fact.filled_prompt, fact.target_true) for fact in facts[1000:1300]]
    careful, tokenizer, report = edited(200)
    whole, _, written = edited(200, sufficient_probability=1.0)
    assert report.modules[0].norm < 0.9 * written.modules[0].norm
    assert recall(careful, tokenizer, known) >= recall(whole, tokenizer, known)
    # Rounds end where nothing is left to do: more of them are not needed by those that are answered.
    converged = [fact.recalled for fact in report.facts if fact.converged]
    assert sum(converged) >= 0.9 * len(converged)


@pytest.mark.parametrize("probability", [-0.1, 1.5, "much", None])
def test_a_probability_is_one(probability):
    with pytest.raises(ValueError, match="sufficient_probability must be a number from 0 to 1"):
        EditConfig(task_type="CAUSAL_LM", sufficient_probability=probability)


def test_a_stage_within_another_counts_for_itself_alone(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 6.0, 10.0, 12.0, 13.0])
    monkeypatch.setattr("peft_edit.stopwatch.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch("solve"):
        with watch("check"):
            pass
    assert watch.seconds == {"check": 3.0, "solve": 3.0}
    with watch("solve"):
        pass
    assert watch.seconds == {"check": 3.0, "solve": 5.0}
