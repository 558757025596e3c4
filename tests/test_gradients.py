"""Value gradients (UltraEdit): read in one pass, written as the published equations say, undone in the adapter."""

from functools import partial

import pytest
import torch

from peft_edit import EditConfig, EditMemory, Fact
from peft_edit.evaluation import score_edits
from peft_edit.gradients import read_gradients
from peft_edit.running import Penalties
from peft_edit.statistics import KeyStatistics
from peft_edit.updates import make_update
from peft_edit.updates.base import Task

from .method_run import deltas, edit, memory_of, normal, same


pytest_plugins = "tests.method_run"


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
