"""Every published method as a preset: it edits, undoes, keeps its budget, and goes on after loading."""

import copy
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_edit import EditConfig, EditMemory
from peft_edit.adapter import module_solution
from peft_edit.methods import METHODS
from peft_edit.tiny import load_tiny_model
from peft_edit.updates import UPDATES


ROOT = Path(__file__).resolve().parents[1]
QUICK = {"task_type": "CAUSAL_LM", "search_steps": 10, "num_contexts": 1}

# With λp = d_in a single layer writes about half of each value, which is short of most targets where the search's
# values are not refined; a λp twenty-five times smaller writes nearly all of it.
WEIGHTS = {"memit": 41.0, "memit-forgetful": 41.0, "prune": 41.0, "rect": 41.0}
# Of 20. RECT misses the entries that it sets to zero; UltraEdit's one step needs statistics of more facts than these.
RECALLED = {"rect": 10, "ultraedit": 5}

SEARCHING = [name for name in sorted(METHODS) if not EditConfig.from_method(name).update_rule().from_gradients]

names = pytest.mark.parametrize("name", sorted(METHODS))


@dataclass
class Edited:
    """A model with 20 facts in two batches, and one that was saved and loaded in between."""

    model: Any
    reloaded: Any
    saved_delta: torch.Tensor
    loaded_delta: torch.Tensor
    config: EditConfig
    recalled: int


def delta(model):
    """The delta of the one edited module."""
    [layer] = model.base_model.edit_layers().values()
    return layer.get_delta("default").clone()


def close(found, expected, tolerance=1e-6):
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


def adapted(name, statistics, **settings):
    base, tokenizer = load_tiny_model()
    weight = {"preservation_weight": WEIGHTS[name]} if name in WEIGHTS else {}
    model = get_peft_model(base, EditConfig.from_method(name, **{**QUICK, **weight, **settings})).eval()
    model.set_statistics(statistics.subset(list(model.base_model.edit_layers())))
    return model, tokenizer


@pytest.fixture(scope="module")
def edited(facts, tiny_statistics, tmp_path_factory):
    """Makes each method's `Edited` once."""
    made: dict[str, Edited] = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model, tokenizer = adapted(name, tiny_statistics)
            model.edit_facts(facts[:10], tokenizer, batch_size=10, progress=False)
            model.save_pretrained(folder)
            saved = delta(model)
            reloaded = PeftModel.from_pretrained(load_tiny_model()[0], folder).eval()
            loaded = delta(reloaded)
            for each in (reloaded, model):
                report = each.edit_facts(facts[10:20], tokenizer, batch_size=10, progress=False)
                assert report.written == 10
            # The first batch once more, after the second.
            asked = model.base_model.edited_facts()
            recalled = greedy_answers(model, tokenizer, [(fact.filled_prompt, fact.target) for fact in asked])
            config = EditConfig.from_pretrained(str(folder))
            made[name] = Edited(model, reloaded, saved, loaded, config, recalled)
        return made[name]

    return make


def greedy_answers(model, tokenizer, pairs):
    """How many prompts the model completes with the answer, one token after the other."""
    count = 0
    for prompt, answer in pairs:
        wanted = tokenizer(" " + answer.strip(), add_special_tokens=False)["input_ids"]
        encoded = tokenizer(prompt, return_tensors="pt")
        written = model.generate(
            **encoded, max_new_tokens=len(wanted), do_sample=False, pad_token_id=tokenizer.eos_token_id or 0
        )
        count += written[0, encoded["input_ids"].shape[1] :].tolist() == wanted
    return count


@names
def test_most_facts_take(name, edited):
    assert edited(name).recalled >= RECALLED.get(name, 16)


@names
def test_loading_and_going_on_is_as_never_having_saved(name, edited):
    run = edited(name)
    assert torch.equal(run.loaded_delta, run.saved_delta)
    assert run.config.method == name
    assert run.config.update_rule() == run.model.peft_config["default"].update_rule()
    assert close(delta(run.reloaded), delta(run.model))
    assert not close(delta(run.model), run.saved_delta, 1e-2)


@names
def test_undo_is_as_never_having_known(name, edited):
    """The delta without fact 3 against one solved anew from the memory's pairs without its row."""
    model = copy.deepcopy(edited(name).model)
    memory = model.peft_config["default"].memory
    [module] = memory.pairs
    (keys, values), second = memory.pairs[module]
    kept = [row for row in range(10) if row != 3]
    fresh = EditMemory(
        memory.statistics,
        memory.contexts,
        tuple(record for place, record in enumerate(memory.records) if place != 3),
        {module: ((keys[kept], values[kept]), second)},
        memory.batches,
    )
    expected = module_solution(model.base_model, "default", module, fresh).delta.float()
    before = delta(model)
    model.remove_facts(memory.records[3])
    assert len(model.edited_facts()) == 19
    assert close(delta(model), expected)
    assert not close(before, expected, 1e-3)


@names
def test_without_any_fact_the_delta_is_zero(name, edited):
    model = copy.deepcopy(edited(name).model)
    model.remove_facts(model.edited_facts())
    assert not bool(delta(model).any())


@names
def test_budget(name, edited, facts):
    model = copy.deepcopy(edited(name).model)
    [layer] = model.base_model.edit_layers().values()
    before = delta(model)
    share = 0.5 * float(before.double().norm()) / layer.base_norm()
    model.set_norm_budget(share)
    cap = share * layer.base_norm()
    assert float(delta(model).double().norm()) == pytest.approx(cap, rel=1e-6)
    _, tokenizer = load_tiny_model()
    report = model.edit_facts(facts[20:22], tokenizer, progress=False)
    assert float(delta(model).double().norm()) <= cap * (1 + 1e-6)
    assert report.modules[0].budget_binding
    model.remove_facts(model.edited_facts()[20:])
    model.set_norm_budget(None)
    assert close(delta(model), before)


@pytest.mark.parametrize("name", SEARCHING)
def test_mpes_goes_with_any(name, facts, tiny_statistics):
    model, tokenizer = adapted(name, tiny_statistics, early_stopping="mpes", search_steps=25)
    report = model.edit_facts(facts[:3], tokenizer, batch_size=3, progress=False)
    assert report.written == 3
    assert all(fact.converged and fact.steps < 24 for fact in report.facts)
    assert bool(delta(model).any())


@names
def test_preset_and_overrides(name):
    config = EditConfig.from_method(name)
    assert config.method == name
    assert METHODS[name].summary and METHODS[name].source.startswith("arXiv ")
    for field, value in METHODS[name].settings.items():
        assert getattr(config, field) == value
    changed = EditConfig.from_method(name, norm_penalty=3.0, search_steps=7, update="ridge", refinements=1)
    assert (changed.norm_penalty, changed.search_steps, changed.update) == (3.0, 7, "ridge")
    assert changed.refinements == 1


def test_unknown_method():
    with pytest.raises(ValueError, match=r"no method 'memento'; there are \[.*'memit'.*\]"):
        EditConfig.from_method("memento")


def test_rome_edits_fact_by_fact(facts, tiny_statistics):
    model, tokenizer = adapted("rome", tiny_statistics)
    model.edit_facts(facts[:3], tokenizer, progress=False)
    assert [record.batch for record in model.edited_facts()] == [1, 2, 3]


def test_what_sets_the_methods_apart(edited):
    """Each delta has the property that its rule promises, at the keys of the model's own edits."""

    def pairs(name):
        memory = edited(name).model.peft_config["default"].memory
        [module] = memory.pairs
        return memory.pairs[module]

    def missed(name, batch):
        keys, values = pairs(name)[batch]
        return float((keys @ delta(edited(name).model).T - values).norm() / values.norm())

    assert missed("emmet", 1) < 1e-4  # all pairs of the last batch are met exactly
    assert missed("rome", 1) > 1e-3  # of a batch in one step each pair disturbs those before it
    assert missed("memit", 1) > 1e-3
    assert missed("memit-forgetful", 0) > missed("memit", 0)
    zeros = {name: float((delta(edited(name).model) == 0).float().mean()) for name in ("memit", "rect")}
    assert zeros["memit"] == 0 and 0.3 < zeros["rect"] <= 0.6
    memory = edited("alphaedit").model.peft_config["default"].memory
    [covariance] = memory.statistics.second_moments.values()
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    threshold = edited("alphaedit").config.update_rule().threshold
    strong = vectors[:, eigenvalues > threshold * eigenvalues.mean()]
    change = delta(edited("alphaedit").model).double()
    assert 0 < strong.shape[1] < len(eigenvalues)
    assert float((change @ strong).norm()) < 1e-5 * float(change.norm())


def code_blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_worked_example_runs(monkeypatch):
    before = set(UPDATES)
    monkeypatch.setitem(UPDATES, "fading", None)  # taken out again afterwards
    scope: dict[str, Any] = {"__name__": "worked_example"}
    monkeypatch.setitem(sys.modules, "worked_example", ModuleType("worked_example"))  # dataclasses look it up
    blocks = code_blocks("docs/methods/adding_a_method.md")
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "adding_a_method.md", "exec"), scope)
    report, model = scope["report"], scope["model"]
    assert len(report.facts) == 20
    assert report.recalled >= 8
    assert set(UPDATES) - before == {"fading"}
    with pytest.raises(ValueError, match=r"retention must be in \(0, 1\]"):
        EditConfig(update="fading", update_settings={"retention": 0})
    check_fading(model, scope["config"].update_rule().retention)


def check_fading(model, retention):
    """Δ ← γΔ + R Kᵀ (λp C + λn I + K Kᵀ)⁻¹ with R = V − γΔK, batch after batch, K with one key a column."""
    memory = model.peft_config["default"].memory
    [(module, covariance)] = memory.statistics.second_moments.items()
    weight = len(covariance)  # λp in units of d_in
    penalty = 0.01 * weight * float(covariance.double().trace()) / len(covariance)
    system = weight * covariance.double() + penalty * torch.eye(len(covariance), dtype=torch.float64)
    expected = torch.zeros_like(delta(model)).double()
    for keys, values in memory.pairs[module]:
        columns = keys.double().T
        residual = values.double().T - retention * expected @ columns
        change = torch.linalg.solve(system + columns @ columns.T, columns @ residual.T).T
        expected = retention * expected + change
    assert len(memory.pairs[module]) > 1
    assert close(delta(model).double(), expected)
