"""Baselines: constrained fine-tuning and LoRA, against plain gradients and norms worked out in the test."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_edit import EditConfig, FactError
from peft_edit.baselines import (
    FineTuning,
    LoraTraining,
    down_projections,
    fine_tune,
    limited,
    train_lora,
)
from peft_edit.evaluation import recall
from peft_edit.tiny import load_tiny_model
from peft_edit.training import accumulate_gradients

from .world import town_facts, word_tokenizer


SMALL_LORA = {"config": LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"]), "lr": 3e-3}


def questions(facts):
    return [(fact.filled_prompt, fact.target) for fact in facts]


def ids(tokenizer, fact):
    """Token ids of the prompt, and of the target with the space before it."""
    prompt = tokenizer(fact.filled_prompt)["input_ids"]
    return prompt, tokenizer(fact.filled_prompt + " " + fact.target.strip())["input_ids"][len(prompt) :]


def plain_loss(model, tokenizer, facts):
    """Mean over facts of the mean NLL of a target's tokens, one sequence after the other without padding."""
    losses = []
    for fact in facts:
        prompt, target = ids(tokenizer, fact)
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        losses.append(nn.functional.cross_entropy(logits, torch.tensor(target)))
    return torch.stack(losses).mean()


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(model, before):
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


# --- gradients and constraints ----------------------------------------------------------------------------------


def test_loss_and_greedy_by_hand(tiny, facts):
    model, tokenizer = tiny
    pairs = [ids(tokenizer, fact) for fact in facts[:5]]
    expected = float(plain_loss(model, tokenizer, facts[:5]).detach())
    loss, greedy = accumulate_gradients(model, pairs, 2, backward=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert not greedy
    assert all(weight.grad is None for weight in model.parameters())


def test_one_step_is_adams_on_the_plain_gradient(tiny, facts):
    """From zero moments Adam's first step is lr · g / (|g| + 1e-8) (arXiv 1412.6980, algorithm 1)."""
    model, tokenizer = tiny
    reference = copy.deepcopy(model)
    plain_loss(reference, tokenizer, facts[:5]).backward()
    baseline = FineTuning(model, tokenizer, lr=2e-3, steps=1, max_change=None, chunk_size=2)
    [(name, module)] = baseline.modules.items()
    gradient = reference.get_submodule(name).weight.grad
    expected = reference.get_submodule(name).weight.detach() - 2e-3 * gradient / (gradient.abs() + 1e-8)
    report = baseline.edit_facts(facts[:5])
    assert report.steps == [1]
    sure = gradient.abs() > 1e-4 * gradient.abs().max()  # of less, rounding may turn the sign
    assert float(sure.double().mean()) > 0.9
    assert torch.allclose(module.weight[sure], expected[sure], atol=2e-5)


def test_limited_by_hand():
    base = torch.tensor([[1.0, -1.0], [1.0, 1.0]])  # root mean square 1, norm 2
    change = torch.tensor([[3.0, -0.1], [0.0, -4.0]])  # norm 5.001
    assert limited(change, base, "linf", 0.5).tolist() == [[0.5, pytest.approx(-0.1)], [0.0, -0.5]]
    assert torch.allclose(limited(change, base, "frobenius", 0.5), change / change.norm())
    assert torch.equal(limited(change, base, "frobenius", 3.0), change)


def test_every_entry_stays_in_its_interval(tiny, facts):
    model, tokenizer = tiny
    baseline = FineTuning(model, tokenizer, max_change=0.02, steps=4)
    [module] = baseline.modules.values()
    before = module.weight.detach().clone()
    for part in (facts[:3], facts[3:6]):
        baseline.edit_facts(part)
        largest = float((module.weight - before).abs().max())
        assert largest == pytest.approx(0.02 * float(before.square().mean().sqrt()), rel=1e-4)
    assert baseline.norm_shares().popitem()[1] <= 0.02 * (1 + 1e-5)


def test_frobenius_norm_stays_in_the_ball(tiny, facts):
    model, tokenizer = tiny
    baseline = FineTuning(model, tokenizer, constraint="frobenius", max_change=0.03, steps=5)
    [(name, module)] = baseline.modules.items()
    before = module.weight.detach().clone()
    report = baseline.edit_facts(facts[:6], batch_size=3)
    share = float((module.weight - before).norm() / before.norm())
    assert share == pytest.approx(0.03, rel=1e-4)
    assert report.norms[-1] == {name: pytest.approx(share, rel=1e-5)}


def test_the_ball_moves_along_unless_it_is_cumulative(tiny, facts):
    model, tokenizer = tiny
    baseline = FineTuning(model, tokenizer, max_change=0.02, steps=4, cumulative=False)
    [module] = baseline.modules.values()
    radius = 0.02 * float(module.weight.detach().square().mean().sqrt())
    first = module.weight.detach().clone()
    baseline.edit_facts(facts[:3])
    second = module.weight.detach().clone()
    baseline.edit_facts(facts[3:6])
    assert float((second - first).abs().max()) == pytest.approx(radius, rel=1e-4)
    assert float((module.weight - second).abs().max()) == pytest.approx(radius, rel=1e-4)
    assert float((module.weight - first).abs().max()) > 1.5 * radius


def test_chunks_add_up_to_the_batch(facts):
    deltas = []
    for chunk in (2, 64):
        model, tokenizer = load_tiny_model()
        pairs = [ids(tokenizer, fact) for fact in facts[:5]]
        accumulate_gradients(model, pairs, chunk)
        deltas.append(model.get_submodule("model.layers.0.mlp.down_proj").weight.grad)
    assert float((deltas[0] - deltas[1]).norm()) < 1e-5 * float(deltas[1].norm())


# --- fine-tuning -------------------------------------------------------------------------------------------------


def test_fine_tuning_writes_facts_into_the_edited_matrices_alone(tiny, facts):
    model, tokenizer = tiny
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, flags = weights(model), {name: weight.requires_grad for name, weight in model.named_parameters()}
    baseline = FineTuning(model, tokenizer)
    report = baseline.edit_facts(facts[:8], batch_size=4)
    assert report.facts == 8 and len(report.steps) == len(report.loss) == len(report.norms) == 2
    assert report.recalled >= 7
    assert recall(model, tokenizer, questions(facts[4:8])) >= 75
    assert changed(model, before) == {f"{name}.weight" for name in baseline.modules}
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert all(weight.grad is None for weight in model.parameters())
    assert model.training
    assert str(report).startswith(f"{report.recalled} of 8 facts recalled, {sum(report.steps)} steps in 2 batches")
    baseline.restore()
    assert not changed(model, before)


def test_facts_that_are_known_take_no_step(tiny, facts):
    model, tokenizer = tiny
    known = [(fact.subject, fact.prompt, fact.target_true) for fact in facts[:3]]
    before = weights(model)
    given = [{"subject": subject, "prompt": prompt, "target": target} for subject, prompt, target in known]
    report = FineTuning(model, tokenizer).edit_facts(given)
    assert (report.steps, report.recalled) == ([0], 3)
    assert not changed(model, before)


def test_training_stops_once_all_targets_are_greedy(tiny, facts):
    model, tokenizer = tiny
    report = FineTuning(model, tokenizer, steps=60).edit_facts(facts[0])
    [steps] = report.steps
    assert 0 < steps < 60 and report.recalled == 1
    other, _ = load_tiny_model()
    assert FineTuning(other, tokenizer, steps=steps - 1).edit_facts(facts[0]).recalled == 0


def fails_at(model, count):
    """Makes a model's forward passes fail from the given one on."""
    passes = []

    def hook(_module, _args):
        passes.append(None)
        if len(passes) >= count:
            raise KeyboardInterrupt

    return model.register_forward_pre_hook(hook)


def test_an_interrupted_batch_is_rolled_back(tiny, facts):
    model, tokenizer = tiny
    before = weights(model)
    baseline = FineTuning(model, tokenizer)
    handle = fails_at(model, 3)  # after two steps
    with pytest.raises(KeyboardInterrupt):
        baseline.edit_facts(facts[:2])
    assert not changed(model, before)
    handle.remove()
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert baseline.edit_facts(facts[:2]).recalled == 2


def test_a_loss_that_is_not_finite_is_named(tiny, facts):
    model, tokenizer = tiny
    baseline = FineTuning(model, tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    before = weights(model)[f"{next(iter(baseline.modules))}.weight"]
    with pytest.raises(ValueError, match="not finite after 0 steps .* lower lr"):
        baseline.edit_facts(facts[:2])
    assert torch.equal(next(iter(baseline.modules.values())).weight, before)


def test_small_steps_add_up_in_sixteen_bits(facts):
    model, tokenizer = load_tiny_model(torch.bfloat16)
    baseline = FineTuning(model, tokenizer, lr=2e-5, steps=8)
    [module] = baseline.modules.values()
    before = module.weight.detach().clone()
    typical = before.float().abs().median()
    assert torch.equal((typical + 2e-5).bfloat16(), typical.bfloat16())  # a single step would be lost
    baseline.edit_facts(facts[:4])
    assert module.weight.dtype == torch.bfloat16
    assert float((module.weight != before).float().mean()) > 0.3


def test_conv1d_and_layers_of_your_own():
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=2, n_positions=64))
    before = weights(model)
    baseline = FineTuning(model, tokenizer, layers_to_transform=[2, 1], lr=1e-2, max_change=None)
    report = baseline.edit_facts(town_facts(3))
    assert list(baseline.modules) == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    assert report.recalled == 3
    assert changed(model, before) == {f"{name}.weight" for name in baseline.modules}


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["up_proj", "down_proj"]}, {"layers_to_transform": [3]}])
def test_modules_are_those_of_the_edit_config(settings):
    named = down_projections(load_tiny_model()[0], settings.get("target_modules"), settings.get("layers_to_transform"))
    if settings.get("layers_to_transform"):
        settings = {**settings, "target_modules": ["down_proj"]}
    model = get_peft_model(load_tiny_model()[0], EditConfig(task_type="CAUSAL_LM", **settings))
    assert set(named) == set(model.base_model.edit_layers())


def test_fine_tune_in_place_or_on_a_copy(tiny, facts):
    model, tokenizer = tiny
    before = weights(model)
    other, report = fine_tune(model, tokenizer, facts[:2], inplace=False)
    assert report.recalled == 2 and other is not model
    assert not changed(model, before)
    same, again = fine_tune(model, tokenizer, facts[:2])
    assert same is model and again.steps == report.steps
    assert not changed(model, weights(other))


# --- LoRA --------------------------------------------------------------------------------------------------------


def test_lora_learns_and_leaves_the_base_alone(tiny, facts):
    model, tokenizer = tiny
    before = weights(model)
    baseline = LoraTraining(model, tokenizer, **SMALL_LORA)
    report = baseline.edit_facts(facts[:6], batch_size=3)
    assert report.recalled == 6
    assert recall(baseline.model, tokenizer, questions(facts[3:6])) == 100
    with baseline.model.disable_adapter():
        assert recall(baseline.model, tokenizer, questions(facts[:6])) < 40
    known = [(fact.filled_prompt, fact.target_true) for fact in facts[100:140]]
    assert recall(baseline.model, tokenizer, known) > 50
    restored = baseline.model.unload()
    assert not changed(restored, before)


def test_lora_norms_by_hand(tiny, facts):
    model, tokenizer = tiny
    baseline = LoraTraining(model, tokenizer, **SMALL_LORA, steps=2)
    assert set(baseline.norm_shares().values()) == {0.0}
    report = baseline.edit_facts(facts[:2])
    layer = baseline.model.get_base_model().model.layers[2].mlp.down_proj
    delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    share = float(delta.norm() / layer.base_layer.weight.norm())
    assert share > 0
    assert report.norms[0]["model.layers.2.mlp.down_proj"] == pytest.approx(share, rel=1e-5)


def test_lora_is_seeded_and_leaves_the_global_seed_alone(facts):
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(11 + len(found))
        model, tokenizer = load_tiny_model()
        state = torch.random.get_rng_state()
        adapted, _ = train_lora(model, tokenizer, facts[:2], seed=seed, steps=2, **SMALL_LORA)
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(torch.cat([w.flatten() for name, w in adapted.named_parameters() if "lora_" in name]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_train_lora_on_a_copy(tiny, facts):
    model, tokenizer = tiny
    adapted, report = train_lora(model, tokenizer, facts[:2], inplace=False, **SMALL_LORA)
    assert report.recalled == 2
    assert not any("lora" in name for name, _ in model.named_modules())
    assert "down_proj" in adapted.peft_config["default"].target_modules


def test_an_interrupted_batch_leaves_the_lora_as_it_was(tiny, facts):
    model, tokenizer = tiny
    baseline = LoraTraining(model, tokenizer, **SMALL_LORA)
    baseline.edit_facts(facts[:1])
    before = weights(baseline.model)
    fails_at(model, 3)
    with pytest.raises(KeyboardInterrupt):
        baseline.edit_facts(facts[1:3])
    assert not changed(baseline.model, before)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, settings, said",
    [
        (FineTuning, {"constraint": "l1"}, "constraint must be one of linf, frobenius, got 'l1'"),
        (FineTuning, {"max_change": 0}, "max_change must be None or a share > 0"),
        (FineTuning, {"lr": 0}, "lr must be a number > 0"),
        (FineTuning, {"steps": 0}, "steps must be a whole number >= 1"),
        (FineTuning, {"chunk_size": 1.5}, "chunk_size must be a whole number"),
        (FineTuning, {"layers_to_transform": [99]}, "layer 99, but the model has"),
        (FineTuning, {"target_modules": ["nonsense"]}, r"ends in one of \['nonsense'\]"),
        (FineTuning, {"target_modules": ["mlp"]}, "'model.layers.0.mlp' .* cannot be fine-tuned"),
        (LoraTraining, {"config": LoraConfig(lora_dropout=0.1)}, "set lora_dropout=0"),
        (LoraTraining, {"lr": -1}, "lr must be a number > 0"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_changed(tiny, kind, settings, said):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match=said):
        kind(model, tokenizer, **settings)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("kind", [FineTuning, LoraTraining])
def test_a_baseline_starts_from_a_base_model(tiny, kind):
    model, tokenizer = tiny
    adapted = get_peft_model(model, EditConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"holds adapters; .* unload\(\) or merge_and_unload\(\)"):
        kind(adapted, tokenizer)


def test_bad_facts_and_batches_change_nothing(tiny, facts):
    model, tokenizer = tiny
    before = weights(model)
    baseline = FineTuning(model, tokenizer)
    with pytest.raises(FactError, match="placeholder"):
        baseline.edit_facts([facts[0], {"subject": "A", "prompt": "none", "target": "B"}])
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1"):
        baseline.edit_facts(facts[:2], batch_size=0)
    assert not changed(model, before)
