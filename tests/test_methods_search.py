"""LTI, norm anchors and value gradients: against plain versions of the published equations, and on the tiny model."""

import json
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_edit import EditConfig, EditMemory, Fact, FactError
from peft_edit.anchoring import anchor_norm, anchored
from peft_edit.architectures import TARGET_MODULES, find_blocks
from peft_edit.editing import FactEditor
from peft_edit.evaluation import score_edits
from peft_edit.gradients import read_gradients
from peft_edit.hooks import on_output
from peft_edit.methods import METHODS
from peft_edit.prompts import PromptEncoder, generate_contexts
from peft_edit.residual import ResidualPath, probe_residual_path
from peft_edit.running import Penalties
from peft_edit.search import FullForward, SearchResult, SearchSettings, choose_forward, search_targets
from peft_edit.search.in_context import Inference, encode_in_context, middle_block
from peft_edit.search.split_forward import SplitForward
from peft_edit.statistics import KeyStatistics
from peft_edit.tiny import load_tiny_model
from peft_edit.updates import make_update
from peft_edit.updates.base import Task
from peft_edit.workers import Workers

from .models import build_model
from .world import town_facts, word_tokenizer


EDITED, MIDDLE = 0, 2
TWO_LAYERS = {"target_modules": ["mlp.down_proj"], "layers_to_transform": [0, 1]}


# --- LTI: the search -----------------------------------------------------------------------------------------------


@pytest.fixture
def problem(tiny, facts):
    model, tokenizer = tiny
    contexts = generate_contexts(model, tokenizer, 2, seed=0)
    encoder = PromptEncoder(tokenizer, model.config.vocab_size, 256)
    return model, [encode_in_context(encoder, fact, contexts) for fact in facts[:6]]


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


# --- norm anchors --------------------------------------------------------------------------------------------------


def result(outputs, increments, targets, failed=None):
    count = len(outputs)
    zeros = torch.zeros(count)
    failed = torch.zeros(count, dtype=torch.bool) if failed is None else failed
    return SearchResult(increments, targets, zeros[:, None, None], zeros.long(), failed, zeros, failed, outputs)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_anchored_is_nas(scale):
    """z = (h − s v0) + s v a / ||v||, v = v0 + δ, with h the block's output, s the factor behind the module."""
    outputs, increments, hidden = (normal(7, 5, seed=seed) for seed in range(3))
    found = result(outputs, increments, hidden + scale * increments)
    again = anchored(found, 2.5, ResidualPath(scale=scale))
    for row in range(7):
        value = outputs[row] + increments[row]
        value = value * 2.5 / value.norm()
        assert float((outputs[row] + again.increments[row]).norm()) == pytest.approx(2.5)
        assert torch.allclose(again.increments[row], value - outputs[row])
        assert torch.allclose(again.targets[row], hidden[row] - scale * outputs[row] + scale * value)
    assert again.steps is found.steps


def test_the_anchor_is_a_mean_without_the_longest():
    lengths = torch.arange(1.0, 43.0, dtype=torch.float64)[
        torch.randperm(42, generator=torch.Generator().manual_seed(0))
    ]
    outputs = torch.zeros(42, 3, dtype=torch.float64)
    increments = torch.nn.functional.normalize(normal(42, 3)) * lengths[:, None]
    failed = (lengths == 1.0) | (lengths == 42.0)
    # Of 40 that succeeded, with the norms 2 to 41, the 2 longest do not count.
    assert anchor_norm(result(outputs, increments, outputs, failed)) == pytest.approx(sum(range(2, 40)) / 38)
    with pytest.raises(ValueError, match="failed for every fact"):
        anchor_norm(result(outputs, increments, outputs, torch.ones(42, dtype=torch.bool)))


# --- value gradients -----------------------------------------------------------------------------------------------

D_IN, D_OUT = 9, 6


def task(preservation, penalty, max_norm=None):
    keys = normal(40, D_IN, seed=7)
    penalties = Penalties(keys.T @ keys / 40, preservation, penalty, max_norm)
    cpu = torch.device("cpu")
    return Task(penalties, lambda: normal(D_OUT, D_IN, seed=99), D_OUT, cpu, cpu, torch.float64)


def measured(sizes=(4, 3, 1, 5)):
    return [(normal(n, D_IN, seed=10 + i) + 1.5, 0.01 * normal(n, D_OUT, seed=50 + i)) for i, n in enumerate(sizes)]


def published_ultraedit(pairs, eta, system):
    """μ += nδ/(N+n), s² += n Var + Nnδ²/(N+n), σ² = s²/(N+n−1); v = −η||ĥ||²ĝ; (HᵀH + system)⁻¹HᵀV added up."""
    mean, square, seen = torch.zeros(D_IN + D_OUT).double(), torch.zeros(D_IN + D_OUT).double(), 0
    total = torch.zeros(D_IN, D_OUT).double()
    for hidden, slope in pairs:
        features = torch.cat([hidden, slope], dim=1)
        n = len(features)
        delta = features.mean(0) - mean
        mean = mean + n * delta / (seen + n)
        square = square + (n * features.var(0) if n > 1 else 0) + seen * n * delta**2 / (seen + n)
        seen += n
        scaled = (features - mean) / (square / (seen - 1)).sqrt()
        wanted = torch.stack([-eta * (row[:D_IN] @ row[:D_IN]) * row[D_IN:] for row in scaled])
        total = total + torch.linalg.solve(hidden.T @ hidden + system, hidden.T @ wanted)
    return total.T


@pytest.mark.parametrize("preservation", [0.0, 0.7])
def test_normalized_is_ultraedit(preservation):
    problem, pairs = task(preservation, 1.0), measured()
    covariance, weight = problem.penalties.covariance, problem.base_weight()
    eta = 0.3 * float(torch.trace(weight @ covariance @ weight.T)) ** 0.5 / (D_IN * D_OUT**0.5)
    system = preservation * covariance + torch.eye(D_IN).double()
    expected = published_ultraedit(pairs, eta, system)
    update = make_update("normalized", {"learning_rate": 0.3})
    memory = EditMemory(KeyStatistics({"m": covariance}, 40, "test", {}))
    solution = update.solution(memory, "m", problem)
    for keys, gradients in pairs:
        solution, stored = solution.add(keys, gradients)
        assert stored is gradients
    assert torch.allclose(solution.delta, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="refinements=0"):
        solution.add(*pairs[0], rounds=1)


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_the_learning_rate_is_checked(rate):
    with pytest.raises(ValueError, match="learning rate must be > 0"):
        make_update("normalized", {"learning_rate": rate})


def test_gradients_of_all_modules_in_one_pass(problem):
    model, prompts = problem
    model.double()
    modules = {f"layer {index}": model.model.layers[index].mlp.down_proj for index in (0, 2)}
    found = read_gradients(model, modules, prompts)
    for place, fact in enumerate(prompts):
        row, kept = fact.rows[0], {}

        def keep(_module, _args, output, name, kept=kept):
            output.retain_grad()
            kept[name] = output

        handles = [module.register_forward_hook(partial(keep, name=name)) for name, module in modules.items()]
        scores = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
        target = torch.tensor(row.target_ids)
        loss = -scores[torch.arange(row.prompt_length - 1, len(row.ids) - 1), target].sum()
        loss.backward()
        for handle in handles:
            handle.remove()
        for index, name in enumerate(modules):
            assert torch.allclose(found.gradients[index][place], kept[name].grad[0, row.subject_index], atol=1e-12)
        assert float(found.probability[place]) == pytest.approx(float((-loss.detach() / len(target)).exp()))
    assert not found.failed.any() and not found.converged.any() and found.steps.tolist() == [0] * len(prompts)
    assert found.keys[1].shape == (len(prompts), 1024)


# --- in the adapter ------------------------------------------------------------------------------------------------


@pytest.fixture
def wrap(tiny_statistics):
    """A function that wraps a fresh tiny model with an edit adapter of some method."""

    def make(method="encore", **settings):
        base, tokenizer = load_tiny_model()
        quick = {} if method == "ultraedit" else {"search_steps": 4}
        config = EditConfig.from_method(method, task_type="CAUSAL_LM", **{"num_contexts": 1, **quick, **settings})
        model = get_peft_model(base, config).eval()
        model.set_statistics(tiny_statistics)
        return model, tokenizer

    return make


CASES = {
    "nas": {"method": "nas"},
    "anchored ridge on two layers": {"value_norm": "anchored", **TWO_LAYERS},
    "lti": {"lti": True},
    "lti on two layers": {"lti": True, **TWO_LAYERS},
    "ultraedit": {"method": "ultraedit"},
    "ultraedit on two layers": {"method": "ultraedit", "preservation_weight": "auto", **TWO_LAYERS},
    "ultraedit with a budget": {"method": "ultraedit", "norm_budget": 0.05},
}


def edit(model, facts, tokenizer, **options):
    return model.edit_facts(facts, tokenizer, progress=False, **options)


def deltas(model):
    return {name: layer.get_delta("default").clone() for name, layer in model.edit_layers("default").items()}


def memory_of(model):
    return model.peft_config["default"].memory


def same(one, other, tolerance=0.0):
    return all(float((one[name] - each).norm()) <= tolerance * float(each.norm()) for name, each in other.items())


@pytest.mark.parametrize("case", sorted(CASES))
def test_saving_and_loading_changes_nothing(wrap, facts, tmp_path, case):
    model, tokenizer = wrap(**CASES[case])
    edit(model, facts[:6], tokenizer, batch_size=3)
    assert all(bool(delta.any()) for delta in deltas(model).values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_tiny_model()[0], tmp_path).eval()
    for one in (model, loaded):
        edit(one, facts[6:9], tokenizer)
    assert same(deltas(loaded), deltas(model)) and memory_of(loaded).anchor == memory_of(model).anchor
    budget = CASES[case].get("norm_budget")
    for layer in model.edit_layers().values() if budget else ():
        share = float(layer.get_delta("default").double().norm()) / layer.base_norm()
        assert share == pytest.approx(budget, rel=1e-5)


@pytest.mark.parametrize("case", ["nas", "lti", "ultraedit on two layers"])
def test_processes_that_share_the_work_end_the_same(wrap, facts, monkeypatch, case):
    model, tokenizer = wrap(**CASES[case])
    edit(model, facts[:7], tokenizer, batch_size=4, search_slots=1)

    def in_two_parts(self, count, work, groups=None):
        groups = groups or [list(range(start, count, 2)) for start in range(min(2, count))]
        parts = [list(group) for rank in range(2) for group in groups[rank::2]]
        found = [work(part) for part in parts]
        order = torch.tensor(sum(parts, [])).argsort()
        return [torch.cat(each)[order] for each in zip(*found)]

    monkeypatch.setattr(Workers, "rows", in_two_parts)
    again, _ = wrap(**CASES[case])
    edit(again, facts[:7], tokenizer, batch_size=4, search_slots=1)
    assert same(deltas(again), deltas(model), 1e-3)


@pytest.mark.parametrize("layers", [{}, TWO_LAYERS])
def test_values_have_the_norm_of_the_unedited_model(wrap, facts, monkeypatch, layers):
    written, searched = [], []
    write, look = FactEditor._write, FactEditor._search
    monkeypatch.setattr(
        FactEditor, "_write", lambda self, f, p, found: written.append(found) or write(self, f, p, found)
    )
    monkeypatch.setattr(FactEditor, "_search", lambda self, *args: searched.append(look(self, *args)) or searched[-1])
    model, tokenizer = wrap(method="memit", value_norm="anchored", **layers)
    edit(model, facts[:8], tokenizer, batch_size=4)
    first = searched[0]
    anchor = float((first.outputs + first.increments).norm(dim=-1).mean())  # 5 % of 4 facts is none
    assert memory_of(model).anchor == pytest.approx(anchor, rel=1e-6)
    for found in written:
        assert torch.allclose((found.outputs + found.increments).norm(dim=-1), torch.tensor(anchor), rtol=1e-5)
    free = searched[1]
    assert not torch.allclose((free.outputs + free.increments).norm(dim=-1), torch.tensor(anchor), rtol=1e-3)
    written.clear()
    fixed, _ = wrap(method="memit", value_norm=3.0, **layers)
    edit(fixed, facts[:2], tokenizer)
    assert torch.allclose((written[0].outputs + written[0].increments).norm(dim=-1), torch.tensor(3.0), rtol=1e-5)
    assert memory_of(fixed).anchor is None


def test_an_anchor_that_comes_late_is_that_of_the_unedited_model(wrap, facts):
    model, tokenizer = wrap()
    fresh, _ = wrap(value_norm="anchored")
    edit(model, facts[:6], tokenizer)
    model.peft_config["default"].value_norm = "anchored"
    edit(model, facts[6:10], tokenizer)
    edit(fresh, facts[6:10], tokenizer)
    anchor = memory_of(model).anchor
    assert anchor == pytest.approx(memory_of(fresh).anchor, rel=1e-6)
    edit(model, facts[10:12], tokenizer)
    model.remove_facts(model.edited_facts())
    assert memory_of(model).anchor == anchor and not any(bool(delta.any()) for delta in deltas(model).values())


def test_a_batch_that_fails_leaves_no_anchor(wrap, facts, monkeypatch):
    model, tokenizer = wrap(value_norm="anchored")

    def failing(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(FactEditor, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        edit(model, facts[:3], tokenizer)
    assert memory_of(model).anchor is None and model.edited_facts() == []


def test_the_anchor_in_files(wrap, facts, tmp_path):
    model, tokenizer = wrap(value_norm="anchored")
    edit(model, facts[:2], tokenizer)
    memory_of(model).save(tmp_path)
    path = tmp_path / "edit_memory.json"
    about = json.loads(path.read_text())
    assert EditMemory.load(tmp_path).anchor == about["anchor"] == memory_of(model).anchor
    for damaged in (-1.0, 0, "long"):
        path.write_text(json.dumps({**about, "anchor": damaged}))
        with pytest.raises(ValueError, match=r"edit_memory.json.*cannot be used"):
            EditMemory.load(tmp_path)
    path.write_text(json.dumps({name: value for name, value in about.items() if name != "anchor"}))
    assert EditMemory.load(tmp_path).anchor is None  # as files from before there were anchors


def test_gradients_edit_and_can_be_undone(wrap, facts):
    model, tokenizer = wrap(method="ultraedit", num_contexts=0)
    before = score_edits(model, tokenizer, facts[:40], resamples=10)
    report = edit(model, facts[:40], tokenizer, batch_size=20)
    after = score_edits(model, tokenizer, facts[:40], resamples=10)
    assert before.efficacy == 0 and after.efficacy >= 30 and after.neighborhood >= 85
    assert all(fact.steps == 0 and fact.written and fact.search_probability < 0.2 for fact in report.facts)
    memory = memory_of(model)
    gone = {record.id for record in memory.records[::4]}
    model.remove_facts(gone)
    assert len(model.edited_facts()) == 30
    rule = model.peft_config["default"].update_rule()
    for name, layer in model.edit_layers().items():
        cpu = torch.device("cpu")
        moment = memory.statistics.second_moments[name]
        whole = Task(Penalties(moment, 0.0, 1.0), layer.base_matrix, layer.out_features, cpu, cpu, torch.float64)
        solution = rule.solution(EditMemory(memory.statistics), name, whole)
        for start in (0, 20):  # each batch without the facts that are gone, as if they had never been measured
            keep = [i for i in range(start, start + 20) if memory.records[i].id not in gone]
            solution, _ = solution.add(memory.keys[name][keep], memory.values[name][keep])
        assert torch.allclose(layer.get_delta("default"), solution.delta.float(), rtol=1e-5, atol=1e-8)
    model.remove_facts(model.edited_facts())
    assert not any(bool(delta.any()) for delta in deltas(model).values())
    with pytest.raises(ValueError, match="begin with a batch of at least two"):
        edit(model, facts[:1], tokenizer)
    assert model.edited_facts() == []


def test_values_and_gradients_do_not_mix(wrap, facts, tiny_statistics):
    model, tokenizer = wrap(method="ultraedit", num_contexts=0)
    edit(model, facts[:3], tokenizer)
    assert memory_of(model).gradients
    before = deltas(model)
    model.peft_config["default"].update = "ridge"
    for change in (partial(edit, model, facts[3:5], tokenizer), partial(model.remove_facts, facts[0])):
        with pytest.raises(ValueError, match="holds value gradients and the update 'ridge' needs searched values"):
            change()
    model.peft_config["default"].update = "normalized"
    model.add_adapter("second", EditConfig(task_type="CAUSAL_LM", num_contexts=0, search_steps=2))
    model.set_adapter("second")
    model.set_statistics(tiny_statistics)
    edit(model, facts[3:5], tokenizer)
    with pytest.raises(ValueError, match="One edit memory holds values and the other value gradients"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="memory")
    assert same(deltas(model), before)


def test_facts_whose_gradients_are_not_finite_are_left_out(wrap, facts):
    model, tokenizer = wrap(method="ultraedit", num_contexts=0)
    token = tokenizer("Zyx")["input_ids"][-1]
    good = [fact for fact in facts[:30] if token not in tokenizer(f"{fact.filled_prompt} {fact.target}")["input_ids"]]
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        model.base_model.model.lm_head.weight = torch.nn.Parameter(embedding.clone())
        embedding[token] = torch.nan
    with pytest.warns(UserWarning, match="diverged for 1 fact"):
        report = edit(model, [*good[:3], Fact("Zyx", "{} is in", "Rome")], tokenizer)
    assert [fact.written for fact in report.facts] == [True] * 3 + [False]
    assert all(bool(delta.isfinite().all()) for delta in deltas(model).values())


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"lti": True, "lti_final_weight": 0.0, "lti_middle_weight": 0.0}, "lti_final_weight or lti_middle_weight"),
        ({"lti_final_weight": -1.0}, "lti_final_weight must be a number >= 0"),
        ({"lti_middle_weight": "much"}, "lti_middle_weight must be a number >= 0"),
        ({"lti_layer": -1}, "lti_layer must be None or the index"),
        ({"lti_layer": True}, "lti_layer must be None or the index"),
        ({"value_norm": "bound"}, "value_norm must be 'free', 'anchored' or a number > 0"),
        ({"value_norm": 0.0}, "value_norm must be"),
        ({"update": "normalized", "lti": True}, "searches no values, so lti=True"),
        ({"update": "normalized", "value_norm": "anchored"}, "searches no values, so value_norm='anchored'"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ValueError, match=said):
        EditConfig(**settings)


def test_a_layer_out_of_reach_changes_nothing(wrap, facts):
    model, tokenizer = wrap(lti=True, lti_layer=4)
    with pytest.raises(ValueError, match="lti_layer=4 is out of reach: it must be from 0.*to 3"):
        edit(model, facts[:2], tokenizer)
    assert model.edited_facts() == []


def test_presets():
    nas = EditConfig.from_method("nas")
    assert (nas.update, nas.value_norm, nas.search_optimizer) == ("null_space", "anchored", "adam")
    ultra = EditConfig.from_method("ultraedit", update_settings={"learning_rate": 0.1})
    assert (ultra.update, ultra.preservation_weight, ultra.norm_penalty) == ("normalized", 0.0, 1.0)
    assert ultra.update_rule().learning_rate == 0.1 and ultra.refinement_rounds == 0
    assert EditConfig.from_method("emmet", lti=True, value_norm=4.0, norm_budget=0.1).lti
    assert {"nas", "ultraedit"} <= set(METHODS)
