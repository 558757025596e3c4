"""The target search: equal to a plain loop, on the tiny model; MPES; facts that diverge."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_edit.hooks import evaluating
from peft_edit.prompts import PromptEncoder, generate_contexts
from peft_edit.residual import ResidualPath, probe_residual_path
from peft_edit.search import SearchSettings, choose_forward, forward, search_groups, search_targets
from peft_edit.search.rows import SearchRows, width_buckets
from peft_edit.search.split_forward import SplitForward
from peft_edit.tiny import load_tiny_facts, load_tiny_model

from .plain_search import plain_search


BLOCK = 0


@pytest.fixture
def problem(tiny, facts):
    model, tokenizer = tiny
    contexts = generate_contexts(model, tokenizer, 2, seed=0)
    encoder = PromptEncoder(tokenizer, model.config.vocab_size, 256)
    prompts = [encoder.encode_fact(fact, contexts) for fact in facts[:12]]
    block = model.model.layers[BLOCK]
    return model, block, block.mlp.down_proj, prompts


@pytest.fixture(scope="module")
def encoded():
    model, tokenizer = load_tiny_model()
    encoder = PromptEncoder(tokenizer, model.config.vocab_size, 256)
    return [encoder.encode_fact(fact, []) for fact in load_tiny_facts()[:20]]


def search(model, block, module, prompts, settings, force_full=False):
    place = (model, model.model.layers, BLOCK, module, ResidualPath())
    return search_targets(choose_forward(*place, prompts[0], force_full=force_full), prompts, settings)


@pytest.mark.parametrize("early_stopping", ["mpes", "none"])
def test_equals_the_plain_loop(problem, early_stopping):
    model, block, module, prompts = problem
    settings = SearchSettings(early_stopping=early_stopping, optimizer="adam", steps=10, slots=5)
    found = search(model, block, module, prompts, settings)
    for index, fact in enumerate(prompts):
        delta, steps = plain_search(model, block, module, fact, settings)
        assert steps == int(found.steps[index])
        assert torch.cosine_similarity(delta, found.increments[index], dim=0) >= 0.9999
        assert found.increments[index].norm() == pytest.approx(float(delta.norm()), rel=1e-3)


def test_split_and_full_forward_agree_in_float64(problem):
    model, block, module, prompts = problem
    model.double()
    settings = SearchSettings(steps=8)
    split = search(model, block, module, prompts, settings)
    full = search(model, block, module, prompts, settings, force_full=True)
    assert split.increments.dtype == torch.float64
    assert torch.equal(split.steps, full.steps)
    assert torch.allclose(split.increments, full.increments, rtol=1e-6, atol=1e-9)
    assert torch.allclose(split.targets, full.targets, rtol=1e-6, atol=1e-9)


def test_slots_and_order_do_not_matter(problem):
    model, block, module, prompts = problem
    settings = SearchSettings(steps=8, slots=3)
    few = search(model, block, module, prompts, settings)
    many = search(model, block, module, prompts[::-1], SearchSettings(steps=8, slots=50))
    assert torch.equal(few.steps, many.steps.flip(0))
    assert torch.cosine_similarity(few.increments, many.increments.flip(0)).min() > 0.9999


@given(st.integers(1, 600), st.integers(0, 40))
def test_groups_hold_every_fact_once_and_are_of_one_size(encoded, count, slots):
    prompts = [encoded[place % len(encoded)] for place in range(count)]
    settings = SearchSettings(slots=slots)
    groups = search_groups(prompts, settings)
    assert sorted(place for group in groups for place in group) == list(range(count))
    sizes = [len(group) for group in groups]
    assert max(sizes) <= settings.most_in_group and max(sizes) - min(sizes) <= 1
    assert len(groups) & (len(groups) - 1) == 0
    assert len(groups) == 1 or count > settings.most_in_group * len(groups) // 2


def test_mpes_stops_when_the_target_is_most_probable(problem):
    model, block, module, prompts = problem
    stopped = search(model, block, module, prompts, SearchSettings(optimizer="adam"))
    to_the_end = search(model, block, module, prompts, SearchSettings(optimizer="adam", early_stopping="none"))
    assert bool((to_the_end.steps == 24).all())
    early = stopped.steps < 24
    assert early.float().mean() >= 0.5
    assert bool(stopped.converged[early].all())
    assert stopped.probability[early].mean() < to_the_end.probability[early].mean()


def test_increments_stay_in_the_ball(problem):
    model, block, module, prompts = problem
    settings = SearchSettings(early_stopping="none", max_norm=0.2)
    found = search(model, block, module, prompts, settings)
    hidden = found.targets - found.increments
    assert bool((found.increments.norm(dim=1) <= 0.2 * hidden.norm(dim=1) * (1 + 1e-5)).all())


def test_a_diverging_fact_fails_alone(problem):
    model, block, module, prompts = problem
    poisoned = prompts[3].rows[0].target_ids[0]
    others = [i for i, fact in enumerate(prompts) if poisoned not in sum((row.ids for row in fact.rows), ())]
    healthy = search(model, block, module, [prompts[i] for i in others], SearchSettings(steps=5))
    assert len(others) >= 3 and not healthy.failed.any()
    # A weight that only this fact's own tokens reach: its row of the input embedding.
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.model.embed_tokens.weight[prompts[3].rows[0].ids[prompts[3].rows[0].subject_index]] = torch.nan
    found = search(model, block, module, prompts, SearchSettings(steps=5))
    assert bool(found.failed[3]) and not bool(found.increments[3].any())
    assert not bool(found.failed.all())
    assert bool(torch.isfinite(found.increments).all())


def test_unsplittable_models_fall_back_and_say_so(problem, monkeypatch):
    model, block, module, prompts = problem
    expected = search(model, block, module, prompts, SearchSettings(steps=4))
    forward = model.forward

    def without_a_cache(input_ids, attention_mask=None, use_cache=False, past_key_values=None):
        if past_key_values is not None and past_key_values.get_seq_length():
            raise TypeError("this model continues no cache")
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    monkeypatch.setattr(model, "forward", without_a_cache)
    with pytest.warns(UserWarning, match="cannot be split"):
        found = search(model, block, module, prompts, SearchSettings(steps=4))
    assert torch.cosine_similarity(found.increments, expected.increments).min() > 0.9999


def test_probe_and_modes(tiny):
    model, tokenizer = tiny
    layer = model.model.layers[1]
    ids = tokenizer("Paris is", return_tensors="pt")["input_ids"]
    assert probe_residual_path(model, layer, layer.mlp.down_proj, ids) == ResidualPath()
    model.train()
    model.lm_head.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and not model.lm_head.training


def test_running_out_of_memory_halves_the_facts_at_a_time(problem, monkeypatch):
    model, block, module, prompts = problem
    settings = SearchSettings(steps=6)
    expected = search(model, block, module, prompts, settings)
    logits, most = SplitForward.logits, []

    def small(self, part, increment):
        most.append(len(increment))
        if len(increment) > 4:
            raise torch.OutOfMemoryError("no room for so many")
        return logits(self, part, increment)

    monkeypatch.setattr(SplitForward, "logits", small)
    found = search(model, block, module, prompts, settings)
    assert max(most) == 12 and 3 in most
    assert torch.equal(found.steps, expected.steps)
    assert torch.cosine_similarity(found.increments, expected.increments).min() > 0.9999
    monkeypatch.setattr(SplitForward, "logits", lambda *_: small(None, None, torch.zeros(9, 1)))
    with pytest.raises(torch.OutOfMemoryError):
        search(model, block, module, prompts, settings)


def test_a_hopeless_fact_is_given_up(problem):
    model, block, module, prompts = problem
    within_a_tiny_ball = {"max_norm": 1e-3, "steps": 25}
    patient = search(model, block, module, prompts, SearchSettings(patience=0, **within_a_tiny_ball))
    found = search(model, block, module, prompts, SearchSettings(patience=4, **within_a_tiny_ball))
    assert bool((patient.steps[~patient.converged] == 24).all())
    assert bool((found.steps[~found.converged] < 12).all()) and not bool(found.converged.all())


def test_what_all_facts_share_is_run_once(problem, monkeypatch):
    model, block, module, prompts = problem
    rows = SearchRows.from_prompts(prompts)
    assert rows.shared[0] <= 1 and bool((rows.shared[1:-1] >= 8).all())  # the contexts, with the token that opens them
    run: list[int] = []
    monkeypatch.setattr(forward, "SPARE_TOKENS", 0)  # no padding, for exact counts
    monkeypatch.setattr(block, "forward", lambda *args, real=block.forward, **kwargs: count(run, args, real, kwargs))
    SplitForward(model, list(model.model.layers), BLOCK, module, ResidualPath()).prepare(rows)
    shared, whole = int(rows.shared.sum()), int(rows.lengths.sum())
    once = whole - (len(prompts) - 1) * shared
    assert shared >= 16 and once <= sum(run) <= once + 4 * int(rows.shared.max())  # the shared rows are padded


def count(run, args, real, kwargs):
    run.append(args[0].shape[0] * args[0].shape[1])
    return real(*args, **kwargs)


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=200), spare=st.integers(0, 500))
def test_width_buckets(lengths, spare):
    buckets = width_buckets(lengths, spare, most=64)
    assert sorted(place for bucket in buckets for place in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        widest = max(lengths[place] for place in bucket)
        assert len(bucket) <= 64
        assert sum(widest - lengths[place] for place in bucket) <= spare
