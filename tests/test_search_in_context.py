"""LTI: the search with the fact in context equals a plain loop, whatever the slots and the architecture."""

import pytest
import torch

from peft_edit import Fact, FactError
from peft_edit.architectures import TARGET_MODULES, find_blocks
from peft_edit.gradients import read_gradients
from peft_edit.hooks import on_output
from peft_edit.prompts import PromptEncoder
from peft_edit.residual import ResidualPath, probe_residual_path
from peft_edit.search import FullForward, SearchSettings, choose_forward, search_targets
from peft_edit.search.in_context import Inference, encode_in_context, middle_block
from peft_edit.search.split_forward import SplitForward

from .method_run import edit
from .models import build_model
from .world import town_facts, word_tokenizer


pytest_plugins = "tests.method_run"


EDITED, MIDDLE = 0, 2


def search(model, prompts, settings, force_full=False):
    module = model.model.layers[EDITED].mlp.down_proj
    place = (model, model.model.layers, EDITED, module, ResidualPath())
    return search_targets(choose_forward(*place, prompts[0], force_full=force_full), prompts, settings)


def plain_pass(model, row, added=None):
    """Logits (tokens, vocabulary) of one row, and its middle block's output at the subject through norm and head."""
    seen = {}

    def add(hidden):
        hidden = hidden.clone()
        hidden[0, row.subject_index] = hidden[0, row.subject_index] + added
        return hidden

    def keep(hidden):
        seen["middle"] = hidden[0, row.subject_index]

    module = model.model.layers[EDITED].mlp.down_proj
    with (
        on_output(module, (lambda hidden: None) if added is None else add),
        on_output(model.model.layers[MIDDLE], keep),
    ):
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    return logits, model.lm_head(model.model.norm(seen["middle"]))


def plain_reference(model, prompts):
    """What `plain_pass` gives for each row with the fact in context."""
    with torch.no_grad():
        return [plain_pass(model, told) for told in prompts.told]


def plain_inference_terms(prompts, passes, reference):
    """Both divergences from the answers with the fact in context: means over rows (the first also over tokens)."""
    final, mid = [], []
    for row, told, (logits, lens), (answers, reading) in zip(prompts.rows, prompts.told, passes, reference):
        own = logits[row.prompt_length - 1 : len(row.ids) - 1].log_softmax(-1)
        other = answers[told.prompt_length - 1 : len(told.ids) - 1].log_softmax(-1)
        final.append((own.exp() * (own - other)).sum(-1).mean())
        mid.append((lens.softmax(-1) * (lens.log_softmax(-1) - reading.log_softmax(-1))).sum())
    return torch.stack(final).mean(), torch.stack(mid).mean()


def plain_lti_search(model, prompts, settings):
    """The published objective with both LTI terms: one fact, one row at a time, torch's own Adam."""
    seen = {}
    with torch.no_grad(), on_output(model.model.layers[EDITED], lambda hidden: seen.update(hidden=hidden)):
        plain_pass(model, prompts.rows[0])
        hidden = seen["hidden"][0, prompts.rows[0].subject_index].clone()
        before = plain_pass(model, prompts.essence)[0][-1].log_softmax(-1)
    delta = torch.zeros_like(hidden, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.lr)
    reached, reference = None, plain_reference(model, prompts)
    for step in range(settings.steps):
        adam.zero_grad()
        losses, probable = [], True
        passes = [plain_pass(model, row, delta) for row in prompts.rows]
        for row, (logits, _) in zip(prompts.rows, passes):
            target = torch.tensor(row.target_ids)
            scores = logits[row.prompt_length - 1 : len(row.ids) - 1].log_softmax(-1)
            losses.append(-scores[torch.arange(len(target)), target].mean())
            probable = probable and bool((scores.argmax(-1) == target).all())
        essence = plain_pass(model, prompts.essence, delta)[0][-1].log_softmax(-1)
        final, middle = plain_inference_terms(prompts, passes, reference)
        loss = torch.stack(losses).mean() + settings.kl_weight * (essence.exp() * (essence - before)).sum()
        loss = loss + settings.weight_decay * (delta.norm() / hidden.norm() ** 2 if delta.any() else 0.0)
        loss = loss + settings.final_weight * final + settings.middle_weight * middle
        reached = step if probable and reached is None else reached
        struck = settings.early_stopping == "mpes" and reached is not None
        if step == settings.steps - 1 or (struck and step - reached >= settings.extra_steps):
            return delta.detach(), step
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= min(1.0, float(settings.max_norm * hidden.norm() / delta.norm()))
        if struck and step - reached == settings.extra_steps - 1:
            return delta.detach(), step + 1
    raise AssertionError("unreachable")


@pytest.mark.parametrize("early_stopping", ["mpes", "none"])
def test_lti_equals_the_plain_loop(problem, early_stopping):
    model, prompts = problem
    weights = {"final_weight": 0.05, "middle_weight": 0.02, "middle_block": MIDDLE}
    settings = SearchSettings(early_stopping=early_stopping, optimizer="adam", steps=5, slots=2, **weights)
    found = search(model, prompts[:3], settings)
    for index, fact in enumerate(prompts[:3]):
        delta, steps = plain_lti_search(model, fact, settings)
        assert steps == int(found.steps[index])
        assert torch.cosine_similarity(delta, found.increments[index], dim=0) >= 0.9999
        assert found.increments[index].norm() == pytest.approx(float(delta.norm()), rel=1e-3)


@pytest.mark.parametrize("optimizer, block", [("adam", EDITED), ("normalized", 3)])
def test_lti_split_and_full_forward_agree_in_float64(problem, optimizer, block):
    model, prompts = problem
    model.double()
    weights = {"final_weight": 0.1, "middle_weight": 0.1, "middle_block": block}
    plain = {"steps": 4, "optimizer": optimizer, "early_stopping": "none"}
    split = search(model, prompts[:3], SearchSettings(**plain, **weights))
    full = search(model, prompts[:3], SearchSettings(**plain, **weights), force_full=True)
    assert torch.allclose(split.increments, full.increments, rtol=1e-6, atol=1e-9)
    without = search(model, prompts[:3], SearchSettings(**plain))
    assert not torch.allclose(split.increments, without.increments, rtol=1e-2)


@pytest.mark.parametrize("weights", [{"final_weight": 1.0}, {"middle_weight": 1.0}])
def test_lti_brings_the_search_closer_to_the_answers_in_context(problem, weights):
    model, prompts = problem
    plain = {"early_stopping": "none", "steps": 10, "lr": 0.1, "middle_block": MIDDLE}
    place = 0 if "final_weight" in weights else 1
    apart = []
    for settings in (SearchSettings(**plain), SearchSettings(**plain, **weights)):
        found, terms = search(model, prompts, settings), []
        with torch.no_grad():
            for fact, increment in zip(prompts, found.increments):
                passes = [plain_pass(model, row, increment) for row in fact.rows]
                terms.append(float(plain_inference_terms(fact, passes, plain_reference(model, fact))[place]))
        apart.append(sum(terms) / len(terms))
    assert apart[1] < 0.8 * apart[0]


def test_lti_slots_and_memory_do_not_matter(problem, monkeypatch):
    model, prompts = problem
    weights = {"final_weight": 0.05, "middle_weight": 0.05}
    many = search(model, prompts, SearchSettings(steps=4, **weights))
    few = search(model, prompts[::-1], SearchSettings(steps=4, slots=2, **weights))
    assert torch.equal(few.steps, many.steps.flip(0))
    assert torch.cosine_similarity(few.increments, many.increments.flip(0)).min() > 0.9999
    logits = SplitForward.logits

    def small(self, part, increment):
        if len(increment) > 2:
            raise torch.OutOfMemoryError("no room for so many")
        return logits(self, part, increment)

    monkeypatch.setattr(SplitForward, "logits", small)
    found = search(model, prompts, SearchSettings(steps=4, **weights))
    assert torch.cosine_similarity(found.increments, many.increments).min() > 0.9999


def test_prompts_that_tell_the_fact(tiny):
    model, tokenizer = tiny
    encoder = PromptEncoder(tokenizer, model.config.vocab_size, 256)
    fact = Fact("Danielle Darrieux", "The mother tongue of {} is", "English")
    found = encode_in_context(encoder, fact, ("You. ",))
    plain = encoder.encode_fact(fact, ("You. ",))
    assert (found.rows, found.essence) == (plain.rows, plain.essence)
    asked = "The mother tongue of Danielle Darrieux is"
    told = f"Imagine that {asked} English\nYou. {asked}"
    assert tokenizer.decode(found.told[1].ids[: found.told[1].prompt_length], skip_special_tokens=True) == told
    for row, in_context in zip(found.rows, found.told):
        assert in_context.target_ids == row.target_ids
        assert in_context.ids[in_context.subject_index] == row.ids[row.subject_index]
        assert in_context.subject_index > row.subject_index
    with pytest.raises(FactError, match="context window"):
        encode_in_context(PromptEncoder(tokenizer, model.config.vocab_size, 30), fact, ())
    with pytest.raises(ValueError, match="encode_in_context"):
        search(model, [plain], SearchSettings(final_weight=0.1))


def test_the_middle_block():
    assert [middle_block(edited, 32, None) for edited in (4, 8, 30)] == [18, 20, 30]
    assert middle_block(0, 5, None) == 2 and middle_block(4, 5, None) == 4 and middle_block(0, 5, 3) == 3
    for wanted in (0, 4):
        with pytest.raises(ValueError, match=f"lti_layer={wanted} is out of reach: it must be from 1.*to 3"):
            middle_block(1, 5, wanted)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "opt", "gemma2", "granite", "phi3"])
def test_lti_and_gradients_on_other_architectures(family):
    """What reads the middle block gives the model's own logits for the last one's output, whatever follows it."""
    model, tokenizer = build_model(family, seed=1).double(), word_tokenizer()
    encoder = PromptEncoder(tokenizer, model.config.vocab_size, 128)
    prompts = [encode_in_context(encoder, fact, ("Because word1. ",)) for fact in town_facts(3)]
    blocks = list(find_blocks(model)[1])
    module = blocks[0].get_submodule(TARGET_MODULES[model.config.model_type][0])
    ids = torch.tensor([prompts[0].rows[0].ids])
    path = probe_residual_path(model, blocks[0], module, ids)
    forward = choose_forward(model, blocks, 0, module, path, prompts[0])
    assert isinstance(forward, SplitForward)
    weights = {"final_weight": 0.5, "middle_weight": 0.5}
    settings = SearchSettings(steps=4, early_stopping="none", lr=0.1, **weights)
    found = search_targets(forward, prompts, settings)
    full = search_targets(FullForward(model, blocks, 0, module, path), prompts, settings)
    assert torch.allclose(found.increments, full.increments, rtol=1e-6, atol=1e-9)
    inference, last = Inference(forward, prompts, 1.0, 1.0), {}
    with torch.no_grad(), on_output(blocks[-1], lambda hidden: last.update(hidden=hidden[0])):
        logits = model(input_ids=ids, use_cache=False).logits[0]
        assert torch.allclose(inference.lens(last["hidden"]), logits, atol=1e-9)
    gradients = read_gradients(model, {"m": module}, prompts)
    assert not gradients.failed.any() and bool((gradients.gradients[0] != 0).any(1).all())


def test_a_layer_out_of_reach_changes_nothing(wrap, facts):
    model, tokenizer = wrap(lti=True, lti_layer=4)
    with pytest.raises(ValueError, match="lti_layer=4 is out of reach: it must be from 0.*to 3"):
        edit(model, facts[:2], tokenizer)
    assert model.edited_facts() == []
