"""Scores of edits against plain loops and numbers worked out by hand; beside the base; with several processes."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_edit import Fact
from peft_edit.evaluation import scores
from peft_edit.evaluation.bootstrap import harmonic_mean
from peft_edit.evaluation.scores import EditScores, compare_with_base, comparison, recall, score_edits, unedited_base
from peft_edit.evaluation.token_scores import score_tokens, token_accuracy, token_agreement
from peft_edit.hooks import on_output
from peft_edit.scoring import predict_targets, score_targets

from . import evaluation_run
from .plain_scores import KINDS, NAN, edited_tiny, plain_pair


pytest_plugins = "tests.plain_scores"


ROOT = Path(__file__).resolve().parents[1]


# --- efficacy, paraphrase, neighborhood ------------------------------------------------------------------------------


def test_comparison_by_hand():
    new, true = [math.log(0.6), math.log(0.2), math.log(0.5)], [math.log(0.1), math.log(0.3), math.log(0.5)]
    success, magnitude = comparison(new, true, "efficacy")
    assert success.tolist() == [100, 0, 0] and magnitude.tolist() == pytest.approx([50, -10, 0])
    success, magnitude = comparison(new, true, "neighborhood")
    assert success.tolist() == [0, 100, 0] and magnitude.tolist() == pytest.approx([-50, 10, 0])
    success, magnitude = comparison([NAN, math.log(0.5)], [math.log(0.5), NAN], "efficacy")
    assert success.tolist() == [0, 0] and magnitude.tolist() == pytest.approx([-50, 50])  # NaN is no probability
    with pytest.raises(ValueError, match="kind must be one of"):
        comparison(new, true, "locality")


def test_scores_from_values_of_facts_by_hand():
    per_fact = {
        "efficacy": [100.0, 100.0, 0.0, 100.0],
        "paraphrase": [50.0, NAN, 0.0, 100.0],
        "neighborhood": [100.0, 100.0, 100.0, 100.0],
        **{f"{kind}_accuracy": [100.0, 0.0, 0.0, 0.0] for kind in KINDS},
        **{f"{kind}_magnitude": [10.0, -10.0, 20.0, NAN] for kind in KINDS},
    }
    found = EditScores.of(per_fact, resamples=20)
    assert (found.efficacy, found.paraphrase, found.neighborhood) == (75, 50, 100)
    assert found.score == pytest.approx(3 / (1 / 75 + 1 / 50 + 1 / 100)) and found.facts == 4
    assert found.efficacy_accuracy == 25 and found.neighborhood_magnitude == pytest.approx(20 / 3)
    assert found.intervals["neighborhood"] == (100, 100)
    part = found.subset([3, 0])
    assert (part.facts, part.efficacy, part.paraphrase, part.resamples) == (2, 100, 75, 20)
    assert part.per_fact["paraphrase"] == [100, 50]
    assert math.isnan(found.subset([1]).paraphrase) and math.isnan(found.subset([1]).score)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["intervals"]["neighborhood"] == [100, 100] and data["efficacy"] == 75 and "per_fact" not in data
    assert found.to_dict(per_fact=True)["per_fact"]["efficacy"] == [100, 100, 0, 100]
    assert "NS 100.0 [100.0, 100.0]" in str(found) and "(greedy: 25.0 / 25.0 / 25.0)" in str(found)


def test_scores_are_those_of_a_plain_loop(noisy, facts):
    model, tokenizer = noisy
    chosen = [*facts[:6], dataclasses.replace(facts[6], paraphrases=("They say of {} that it is",))]
    chosen.append(dataclasses.replace(facts[7], paraphrases=(), neighborhood=()))
    expected = {f"{kind}{end}": [] for end in ("", "_accuracy", "_magnitude") for kind in KINDS}
    for fact in chosen:
        prompts = {
            "efficacy": [fact.filled_prompt],
            "paraphrase": [text.replace("{}", fact.subject) for text in fact.paraphrases],
            "neighborhood": fact.neighborhood,
        }
        for kind in KINDS:
            rows = []
            for prompt in prompts[kind]:
                answers = (fact.target, fact.target_true)
                wanted, other = answers[::-1] if kind == "neighborhood" else answers
                one, hits = plain_pair(model, tokenizer, prompt, wanted)
                two, _ = plain_pair(model, tokenizer, prompt, other)
                one, two = sum(one) / len(one), sum(two) / len(two)
                rows.append((100 * (one > two), 100 * all(hits), 100 * (math.exp(one) - math.exp(two))))
            means = [sum(column) / len(rows) for column in zip(*rows)] if rows else [NAN] * 3
            for end, mean in zip(("", "_accuracy", "_magnitude"), means):
                expected[kind + end].append(mean)
    found = score_edits(model, tokenizer, chosen, resamples=30, confidence=0.5, seed=2)
    for name, values in expected.items():
        assert found.per_fact[name] == pytest.approx(values, abs=1e-3, nan_ok=True), name
        present = [value for value in values if not math.isnan(value)]
        assert getattr(found, name) == pytest.approx(sum(present) / len(present), abs=1e-3)
    assert 0 < found.efficacy < 100 and 0 < found.neighborhood < 100  # there was something to tell apart
    assert found.intervals["score"][0] <= found.intervals["score"][1]
    assert (found.confidence, found.resamples, found.seed) == (0.5, 30, 2)


def test_batch_size_does_not_matter(noisy, facts):
    one, many = (score_edits(*noisy, facts[:10], batch_size=size, resamples=20).to_dict(True) for size in (1, 128))
    for name, values in one.pop("per_fact").items():
        assert values == pytest.approx(many["per_fact"][name], abs=1e-3)
    assert one["score"] == pytest.approx(many["score"]) and one["intervals"].keys() == many["intervals"].keys()


def test_a_prompt_that_several_facts_ask_is_run_once(noisy, facts, monkeypatch):
    asked = []

    def counting(model, pairs, chunk):
        asked.append(len(pairs))
        return score_targets(model, pairs, chunk)

    monkeypatch.setattr(scores, "score_targets", counting)
    fact = dataclasses.replace(facts[0], paraphrases=("{} is of",), neighborhood=("A is of", "B is of"))
    twin = dataclasses.replace(facts[1], target=fact.target, target_true=fact.target_true, paraphrases=("A is of",))
    twin = dataclasses.replace(twin, neighborhood=(fact.filled_prompt, "B is of"))
    score_edits(*noisy, [fact, twin], resamples=5)
    assert asked == [2 * 5]  # two edited prompts, one paraphrase, two neighbours, each with two targets


def test_a_model_that_always_says_one_word_scores_badly(tiny, facts):
    model, tokenizer = tiny
    word = next(fact.target for fact in facts if len(tokenizer(" " + fact.target)["input_ids"]) == 2)
    chosen = [dataclasses.replace(fact, target=word) for fact in facts[:40] if fact.target_true != word]
    token = tokenizer(" " + word)["input_ids"][-1]

    def always(logits):
        return logits.index_fill(-1, torch.tensor([token]), 60.0)

    before = score_edits(model, tokenizer, chosen, resamples=20)
    with on_output(model.get_output_embeddings(), always):
        after = score_edits(model, tokenizer, chosen, resamples=20)
    assert before.neighborhood > 95
    assert after.efficacy == after.paraphrase == after.efficacy_accuracy == 100
    assert after.neighborhood == after.neighborhood_accuracy == after.score == 0
    assert after.neighborhood_magnitude < -99 and after.intervals["score"] == (0, 0)
    change = after.minus(before)["neighborhood"]
    assert change.value < -95 and change.high < -90
    # A word that no target has leaves the comparison as it was; accuracy and magnitude show it.
    targets = {fact.target for fact in facts[:40]} | {fact.target_true for fact in facts[:40]}
    token = tokenizer(" " + next(fact.target for fact in facts if fact.target not in targets))["input_ids"][-1]
    with on_output(model.get_output_embeddings(), always):
        other = score_edits(model, tokenizer, facts[:40], resamples=20)
    assert other.neighborhood > 90 and other.neighborhood_accuracy < 10 and abs(other.neighborhood_magnitude) < 5


def test_errors_name_what_is_missing(tiny, facts):
    with pytest.raises(ValueError, match="no facts to score"):
        score_edits(*tiny, [])
    with pytest.raises(ValueError, match="'The town of Ada' has no target_true"):
        score_edits(*tiny, [Fact("Ada", "The town of {}", "Rome")])
    bare = score_edits(*tiny, [dataclasses.replace(facts[0], paraphrases=(), neighborhood=())])
    assert bare.efficacy == 0 and math.isnan(bare.paraphrase) and math.isnan(bare.score)
    with pytest.raises(ValueError, match="no prompts to recall"):
        recall(*tiny, [])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter .* pass the unedited model as base="):
        compare_with_base(*tiny, facts[:2])


# --- token accuracy --------------------------------------------------------------------------------------------------


def test_token_accuracy_is_that_of_a_plain_loop(noisy, facts):
    model, tokenizer = noisy
    pairs = [(fact.filled_prompt, f"{fact.target_true} in {fact.target}") for fact in facts[:8]]
    expected = [np.mean(plain_pair(model, tokenizer, *pair)[1]) for pair in pairs]
    assert token_accuracy(model, tokenizer, pairs) == pytest.approx(expected)
    assert any(0 < share < 1 for share in expected)
    assert token_accuracy(model, tokenizer, []) == []


def test_tokens_by_hand(tiny):
    model, tokenizer = tiny
    pairs = [([0, 10], [20, 21, 20]), ([0, 10, 11], [20]), ([0], [21, 21])]

    def always(logits):
        return logits.index_fill(-1, torch.tensor([20]), 60.0)

    with on_output(model.get_output_embeddings(), always):
        found = score_targets(model, pairs, chunk=2)
        predicted = predict_targets(model, pairs, chunk=2)
    assert found.token_accuracy.tolist() == pytest.approx([2 / 3, 1, 0])
    assert found.greedy.tolist() == [False, True, False]
    assert [tokens.tolist() for tokens in predicted] == [[20, 20, 20], [20], [20, 20]]


def test_token_scores_of_edits_beside_the_base(tiny, noisy, facts):
    base, tokenizer = tiny
    model, _ = noisy
    chosen = [dataclasses.replace(fact, target=f"{fact.target} of {fact.target_true}") for fact in facts[:8]]
    locality = [[(text, "the city of") for text in fact.neighborhood] for fact in chosen]
    found = score_tokens(model, tokenizer, chosen, locality, base=base, resamples=20)
    expected = []
    for asked in locality:
        shares = []
        for prompt, answer in asked:
            start, ids = (len(tokenizer(text)["input_ids"]) for text in (prompt, f"{prompt} {answer}"))
            ids = tokenizer(f"{prompt} {answer}")["input_ids"]
            with torch.no_grad():
                one, two = (each(input_ids=torch.tensor([ids])).logits[0].argmax(-1) for each in (model, base))
            shares.append(float((one == two)[start - 1 : len(ids) - 1].float().mean()))
        expected.append(100 * sum(shares) / len(shares))
    assert found.per_fact["locality"] == pytest.approx(expected)
    assert 0 < found.locality < 100
    rewrite = [plain_pair(model, tokenizer, fact.filled_prompt, fact.target)[1] for fact in chosen]
    assert found.rewrite == pytest.approx(100 * np.mean([np.mean(hits) for hits in rewrite]))
    before = [plain_pair(base, tokenizer, fact.filled_prompt, fact.target)[1] for fact in chosen]
    assert found.base_rewrite == pytest.approx(100 * np.mean([np.mean(hits) for hits in before]))
    assert found.score == pytest.approx(float(harmonic_mean([found.rewrite, found.paraphrase, found.locality])))
    assert "locality" in str(found) and "per_fact" not in json.loads(json.dumps(found.to_dict()))
    untouched = score_tokens(base, tokenizer, chosen, base=base, resamples=20)
    assert untouched.locality == 100 and untouched.rewrite == untouched.base_rewrite
    with pytest.raises(ValueError, match="an entry for each of the 8 facts, got 1"):
        score_tokens(model, tokenizer, chosen, locality[:1], base=base)


# --- beside the base, merged or not ----------------------------------------------------------------------------------


def test_the_base_stands_beside_whether_merged_or_not(tiny, facts):
    model, tokenizer = edited_tiny(tiny)
    chosen = facts[:8]
    with model.disable_adapter():
        base = score_edits(model, tokenizer, chosen, resamples=20)
    edited = score_edits(model, tokenizer, chosen, resamples=20)
    assert base.neighborhood == 100 > edited.neighborhood
    open_ = compare_with_base(model, tokenizer, chosen, resamples=20)
    assert (open_.edited, open_.base) == (edited, base)
    model.merge_adapter()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    merged = compare_with_base(model, tokenizer, chosen, resamples=20)
    assert merged.base == base
    assert merged.edited.per_fact["efficacy_magnitude"] == pytest.approx(
        edited.per_fact["efficacy_magnitude"], abs=1e-2
    )
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(layer.merged for layer in model.edit_layers().values())
    agreement = token_agreement(model, tokenizer, [(fact.filled_prompt, fact.target_true) for fact in chosen])
    assert min(agreement) < 1 and all(layer.merged for layer in model.edit_layers().values())
    table = str(merged)
    assert table.startswith("8 facts") and "neighborhood, accuracy" in table and "100.0 [100.0, 100.0]" in table
    data = json.loads(json.dumps(merged.to_dict()))
    difference = merged.edited.neighborhood - 100
    assert data["difference"]["neighborhood"][0] == pytest.approx(difference)
    assert data["base"]["neighborhood"] == 100 and merged.subset([0, 1]).base.facts == 2
    with pytest.raises(ArithmeticError), unedited_base(model):
        raise ArithmeticError
    assert all(layer.merged and not layer.disable_adapters for layer in model.edit_layers().values())


# --- several processes -----------------------------------------------------------------------------------------------


def launch(folder, processes=2):
    """Runs the scenarios as `accelerate launch` would, and returns what each process found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, "-m", "tests.evaluation_run", str(folder)]
        started.append(
            subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [process.communicate(timeout=300)[0].decode() for process in started]
    for process, output in zip(started, outputs):
        assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def assert_close(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_close(one, other)
    else:
        assert found == pytest.approx(expected, abs=2e-3, nan_ok=True)


def test_processes_share_the_prompts_and_all_return_the_same(tmp_path):
    first, second = launch(tmp_path)
    assert repr(first["scores"]) == repr(second["scores"])  # NaN equals itself this way
    assert_close(first["scores"], evaluation_run.run_scores())
    for found in (first, second):
        assert "given different prompts" in found["refusal"]
