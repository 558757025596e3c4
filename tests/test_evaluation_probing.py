"""Probes and overfitting scores: sums done by hand on a model whose probabilities are known."""

import json
import math

import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig, Fact
from peft_edit.evaluation.cases import Case, Probe
from peft_edit.evaluation.probing import (
    distraction_prompts,
    negation_probe,
    score_overfitting,
    score_probes,
)
from peft_edit.hooks import on_output
from peft_edit.prompts import PromptEncoder


SHARES = {"Rome": 0.5, "Paris": 0.3, "London": 0.15}


@pytest.fixture
def fixed(tiny):
    """A model that gives every next word the probability of `SHARES`, and 0.05 spread over all others."""
    model, tokenizer = tiny
    encoder = PromptEncoder(tokenizer, model.config.vocab_size)
    shares = torch.full((model.config.vocab_size,), 0.05 / (model.config.vocab_size - len(SHARES)))
    for word, share in SHARES.items():
        (token,) = encoder.continuation_ids("It is", word)[1]
        shares[token] = share
    with on_output(model.get_output_embeddings(), lambda logits: shares.log().expand_as(logits)):
        yield model, tokenizer


ADA = Fact(
    "Ada",
    "The home of {} is",
    "Paris",
    target_true="Rome",
    paraphrases=("{} lives in", "{}'s home:"),
    neighborhood=("The home of Dan is", "The home of Eve is"),
)
BEN = Fact("Ben", "{} lives in", "Rome", target_true="London", neighborhood=("Cleo lives in",))
ASKED = Fact("Cleo", "What is the home of {}?", "Paris", target_true="Paris Rome")


def test_probes_by_hand(fixed):
    """The model says "Rome" whatever it is asked."""
    cases = [
        Case(ADA, {"portability": (Probe("a", ("Rome", "London")), Probe("b", ("London",)))}),
        Case(BEN, {"portability": (Probe("c", ("London",)),), "unrelated": (Probe("d", ("Rome Rome",)),)}),
        Case(ASKED),
    ]
    scores = score_probes(*fixed, cases)
    found = scores.kinds["portability"]
    # Ada: one of two answered; "Paris" never said. Ben: not answered, but the edit target "Rome" is said.
    assert found.per_case["answered"][:2] == [50.0, 0.0] and math.isnan(found.per_case["answered"][2])
    assert found.answered == 25.0 and found.overfit == 50.0 and found.cases == 2 and found.probes == 3
    # "Rome" stands in the right answer, so that saying it is no overfitting.
    assert scores.kinds["unrelated"].answered == 100.0 and math.isnan(scores.kinds["unrelated"].overfit)
    free = score_probes(*fixed, cases, "generation", max_new_tokens=3)
    assert free.kinds["portability"].per_case["answered"][:2] == [50.0, 0.0]
    assert free.kinds["unrelated"].answered == 100.0 and free.mode == "generation"
    json.dumps(scores.to_dict(per_case=False))
    assert "per_case" not in scores.to_dict()["kinds"]["portability"]
    assert "per_case" in scores.to_dict(per_case=True)["kinds"]["portability"]
    assert str(scores).splitlines()[1].split() == ["portability", "2", "25.0", "50.0"]
    assert str(scores).splitlines()[2].split() == ["unrelated", "1", "100.0", "-"]


def test_greedy_looks_at_the_words_and_generation_at_the_stop_too(tiny, facts):
    """The model writes "Sweden. The language used by ..."; free, the answer ends after "Sweden"."""
    model, tokenizer = tiny
    fact = facts[1]
    answers = ("Sweden", "Sweden. The language", "Swe")
    cases = [Case(fact, {"unrelated": (Probe(fact.filled_prompt, (answer,)),)}) for answer in answers]
    greedy = score_probes(model, tokenizer, cases).kinds["unrelated"]
    free = score_probes(model, tokenizer, cases, "generation").kinds["unrelated"]
    assert greedy.per_case["answered"][:2] == [100.0, 100.0]
    assert free.per_case["answered"] == [100.0, 0.0, 0.0]
    framed = score_probes(model, tokenizer, cases[:1], template="{} not").kinds["unrelated"]
    assert framed.answered == 0.0


def test_overfitting_by_hand(fixed):
    probes = {
        "multi_hop": (Probe("Where is Ada now? In", ("London", "Rome")), Probe("Her town is", ("Paris",))),
        "negation": (Probe("Ada never lived in", ("London",)),),
    }
    scores = score_overfitting(*fixed, [Case(ADA, probes), BEN, ASKED]).kinds
    near = pytest.approx
    # Ada: Paris 0.3 was Rome 0.5. Ben: Rome 0.5 was London 0.15. Asked: Paris 0.3 was "Paris Rome", sqrt(0.3 * 0.5).
    both = 100 * math.sqrt(0.15)
    edits = scores["efficacy"]
    assert edits.per_case["cap"] == near([30, 50, 30]) and edits.per_case["oap"] == near([50, 15, both], rel=1e-5)
    assert edits.per_case["ams"] == [0.0, 100.0, 0.0] and edits.ams == near(100 / 3)
    assert math.isnan(edits.dp) and math.isnan(edits.eos)
    assert scores["paraphrase"].prompts == 2 and scores["paraphrase"].cases == 1 and scores["paraphrase"].ams == 0.0
    for kind in ("neighborhood", "distraction"):
        found = scores[kind]
        # Ada's neighbours: Rome 0.5 is right, Paris 0.3 the target. Ben's: London 0.15 is right, Rome 0.5 the target.
        assert (found.dp, found.cap, found.eos) == near((40.0, 32.5, 50.0))
        assert found.per_case["eos"][:2] == [100.0, 0.0] and math.isnan(found.oap) and math.isnan(found.ams)
        assert (found.cases, found.prompts) == (2, 3)
    assert scores["essence"].per_case["dp"] == near([30, 50, 30]) and math.isnan(scores["essence"].cap)
    # The second probe's answer is the target: it says nothing of overfitting. CAP is that of the better answer.
    hops = scores["multi_hop"]
    assert (hops.prompts, hops.cases, hops.dp, hops.cap, hops.eos) == near((1, 1, 30.0, 50.0, 100.0))
    # Ada's own probe (London 0.15, Paris 0.3); the built ones of Ada (Rome 0.5, Paris) and Ben (London, Rome).
    negated = scores["negation"]
    assert negated.per_case["eos"][:2] == [50.0, 0.0] and negated.per_case["dp"][:2] == near([30.0, 50.0])
    assert negated.per_case["cap"][:2] == near([32.5, 15.0]) and negated.prompts == 3
    assert list(scores) == [
        "efficacy",
        "paraphrase",
        "neighborhood",
        "distraction",
        "essence",
        "multi_hop",
        "negation",
    ]


def test_overfitting_without_true_targets_and_without_negation(fixed):
    scores = score_overfitting(*fixed, [Fact("Dan", "{} lives in", "Rome", neighborhood=("Eve lives in",))])
    near = scores.kinds["neighborhood"]
    assert near.dp == pytest.approx(50.0) and math.isnan(near.cap) and math.isnan(near.eos)
    assert math.isnan(scores.kinds["efficacy"].ams) and scores.kinds["negation"].dp == pytest.approx(50.0)
    lines = str(scores).splitlines()
    assert lines[0].split() == ["overfitting", "cases", "dp", "cap", "oap", "eos", "ams"]
    assert lines[2].split() == ["neighborhood", "1", "50.0", "-", "-", "-", "-"]
    assert "negation" not in score_overfitting(*fixed, [ADA], negation=None).kinds
    with pytest.raises(ValueError, match="no facts to score"):
        score_overfitting(*fixed, [])


def test_prompts_that_are_built():
    assert negation_probe(ADA) == Probe("It is not true that the home of Ada is", ("Rome",), "Ada")
    assert negation_probe(BEN).prompt == "It is not true that Ben lives in"
    the_who = Fact("The Who", "{} come from", "Rome {}")
    assert negation_probe(the_who) == Probe("It is not true that The Who come from", (), "The Who")
    assert negation_probe(ADA, "{} not").prompt == "The home of Ada is not"
    assert distraction_prompts(BEN) == ["Ben lives in Rome. Cleo lives in"]
    dotted = Fact("Ada", "{} was born in the", "U.S.", neighborhood=("Dan was born in the",))
    assert distraction_prompts(dotted) == ["Ada was born in the U.S. Dan was born in the"]
    with pytest.raises(ValueError, match="is a question"):
        negation_probe(ASKED)
    with pytest.raises(ValueError, match="holds no {}"):
        negation_probe(ADA, "It is false")


def test_settings_out_of_range(fixed):
    case = Case(ADA, {"portability": (Probe("a", ("Rome",)),)})
    with pytest.raises(ValueError, match="mode must be one of greedy, generation"):
        score_probes(*fixed, [case], "sampling")
    with pytest.raises(ValueError, match="no probes in the 1 cases"):
        score_probes(*fixed, [Case(ADA)])
    with pytest.raises(ValueError, match="no {} for the prompt"):
        score_probes(*fixed, [case], template="Question:")


def test_an_edit_shows_where_it_belongs_and_a_broken_model_everywhere(tiny, tiny_statistics, facts):
    base, tokenizer = tiny
    before = score_overfitting(base, tokenizer, facts[:3]).kinds
    assert before["efficacy"].ams == 0.0 and before["neighborhood"].eos == 100.0
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", num_contexts=1, search_steps=10))
    model.edit_facts(facts[:3], tokenizer, statistics=tiny_statistics, progress=False)
    after = score_overfitting(model, tokenizer, facts[:3]).kinds
    assert after["efficacy"].ams == 100.0 and after["efficacy"].cap > before["efficacy"].cap + 20
    assert after["negation"].dp >= before["negation"].dp
    fact = facts[0]
    token = PromptEncoder(tokenizer, base.config.vocab_size).continuation_ids(fact.filled_prompt, fact.target)[1][0]
    with on_output(base.get_output_embeddings(), lambda logits: logits + 100.0 * torch.eye(logits.shape[-1])[token]):
        broken = score_overfitting(model, tokenizer, facts[:1]).kinds
    for kind in ("neighborhood", "distraction", "essence", "negation"):
        assert broken[kind].dp > 99.0
    assert broken["neighborhood"].eos == 0.0 and broken["distraction"].cap < 1.0
