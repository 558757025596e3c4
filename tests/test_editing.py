"""Editing end to end on the tiny model: facts take, generalise, leave others alone; undo, update, budget, rollback."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_edit import EditConfig, Fact, FactError, editing, spreading
from peft_edit.evaluation import recall, score_edits
from peft_edit.solve import NormalEquations, auto_penalties, solve_delta
from peft_edit.tiny import load_tiny_model


@pytest.fixture
def wrap(tiny_statistics):
    """A function that wraps a fresh tiny model with an edit adapter that has its key statistics."""

    def make(dtype=torch.float32, **settings):
        base, tokenizer = load_tiny_model(dtype)
        model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", num_contexts=2, **settings)).eval()
        model.set_statistics(tiny_statistics)
        return model, tokenizer

    return make


def edit(model, facts, tokenizer, **options):
    return model.edit_facts(facts, tokenizer, progress=False, **options)


def deltas(model, adapter_name="default"):
    return {name: layer.get_delta(adapter_name).clone() for name, layer in model.edit_layers(adapter_name).items()}


def logits(model, tokenizer, text="The mother tongue of Danielle Darrieux is"):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def test_facts_take_generalise_and_leave_neighbours_alone(wrap, facts):
    model, tokenizer = wrap()
    edited, others = facts[:60], facts[1000:1200]
    base = score_edits(model, tokenizer, edited)
    assert base.efficacy == 0 and base.neighborhood == 100
    report = edit(model, edited, tokenizer, batch_size=20)
    scores = score_edits(model, tokenizer, edited)
    assert scores.efficacy >= 80 and scores.paraphrase >= 70 and scores.neighborhood >= 95
    assert recall(model, tokenizer, [(fact.filled_prompt, fact.target_true) for fact in others]) >= 95
    assert report.written == 60 and report.facts_held == 60 and len(report.norms) == 3
    # The report says what a greedy completion gives.
    assert report.recalled == pytest.approx(60 * scores.efficacy_accuracy / 100, abs=6)
    text = str(report)
    assert "60 of 60 facts written" in text and "||Δ||" in text and "and 40 more facts" in text
    assert report.to_dict()["facts"][0]["subject"] == edited[0].subject and '"norms"' in report.to_json()


def test_same_seed_same_result_and_no_shared_state(wrap, facts):
    config = EditConfig(task_type="CAUSAL_LM", num_contexts=2)
    first, second = (get_peft_model(load_tiny_model()[0], config).eval() for _ in range(2))
    tokenizer = load_tiny_model()[1]
    texts = [fact.filled_prompt for fact in facts]
    for model in (first, second):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.collect_statistics(texts, tokenizer)
    untouched = deltas(second)
    edit(first, facts[:5], tokenizer)
    assert all(torch.equal(untouched[name], delta) for name, delta in deltas(second).items())
    assert second.edited_facts() == [] and first.peft_config["default"] is config is not second.peft_config["default"]
    edit(second, facts[:5], tokenizer)
    assert all(torch.equal(deltas(first)[name], delta) for name, delta in deltas(second).items())


def test_continues_after_saving_in_the_same_way(wrap, facts, tmp_path):
    model, tokenizer = wrap()
    edit(model, facts[:10], tokenizer)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_tiny_model()[0], tmp_path).eval()
    assert torch.equal(logits(loaded, tokenizer), logits(model, tokenizer))
    assert loaded.edited_facts() == model.edited_facts()
    for one in (model, loaded):
        edit(one, facts[10:20], tokenizer)
    assert loaded.edited_facts()[-1].batch == 2
    for name, delta in deltas(model).items():
        assert torch.allclose(deltas(loaded)[name], delta, rtol=1e-4, atol=1e-6)


def test_removing_facts_gives_the_adapter_that_never_had_them(wrap, facts):
    model, tokenizer = wrap(dtype=torch.float64)
    before = logits(model, tokenizer)
    edit(model, facts[:12], tokenizer, batch_size=4)
    memory = model.peft_config["default"].memory
    gone = [record.id for record in memory.records[::3]]
    removed = model.remove_facts(gone)
    assert [record.id for record in removed] == gone and len(model.edited_facts()) == 8
    keep = [i for i, record in enumerate(memory.records) if record.id not in gone]
    for name, delta in deltas(model).items():
        covariance = memory.statistics.second_moments[name].double()
        weights = auto_penalties(covariance, "auto", "auto")
        equations = NormalEquations.from_pairs(memory.keys[name][keep], memory.values[name][keep])
        scratch = solve_delta(equations, covariance, *weights).delta
        assert float((delta - scratch).norm() / scratch.norm()) < 1e-8
    model.remove_facts(model.edited_facts())
    assert torch.equal(logits(model, tokenizer), before)
    with pytest.raises(KeyError, match="holds no fact"):
        model.remove_facts(gone[0])


def test_one_undone_fact_answers_as_before_and_the_others_stay(wrap, facts):
    model, tokenizer = wrap()
    report = edit(model, facts[:10], tokenizer)
    index = next(i for i, fact in enumerate(report.facts) if fact.recalled)
    model.remove_facts(facts[index])
    assert recall(model, tokenizer, [(facts[index].filled_prompt, facts[index].target_true)]) == 100
    rest = [fact for i, fact in enumerate(facts[:10]) if i != index and report.facts[i].recalled]
    assert recall(model, tokenizer, [(fact.filled_prompt, fact.target) for fact in rest]) >= 80


def test_editing_again_replaces_and_says_so(wrap, facts):
    model, tokenizer = wrap()
    edit(model, facts[:5], tokenizer)
    old = facts[2]
    new = Fact(old.subject, old.prompt, facts[4].target, target_true=old.target_true)
    report = edit(model, [new], tokenizer)
    assert report.facts[0].replaced == old.target and "replaced an older target" in str(report)
    held = {record.key: record for record in model.edited_facts()}
    assert len(held) == 5 and held[old.key].target == new.target and held[old.key].batch == 2


def test_a_fact_that_could_not_be_replaced_stays(wrap, facts):
    model, tokenizer = wrap()
    edit(model, facts[:5], tokenizer)
    before, held = deltas(model), model.edited_facts()
    old = facts[2]
    model.peft_config["default"].search_lr = 1e38
    with pytest.warns(UserWarning, match="They were not written"):
        report = edit(model, [Fact(old.subject, old.prompt, facts[4].target)], tokenizer)
    assert not report.facts[0].written and report.facts[0].replaced is None and "replaced" not in str(report)
    assert model.edited_facts() == held
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model).items())


def test_facts_to_remove_may_be_mappings_and_nothing_else_is_taken(wrap, facts):
    model, tokenizer = wrap()
    edit(model, facts[:3], tokenizer)
    fact = facts[0]
    (gone,) = model.remove_facts({"subject": fact.subject, "prompt": fact.prompt, "target": "anything"})
    assert gone.subject == fact.subject and len(model.edited_facts()) == 2
    for wrong in (7, None, [facts[1], 7]):
        with pytest.raises(TypeError, match="named by its id, a Fact, a mapping or an EditRecord, got"):
            model.remove_facts(wrong)
    assert len(model.edited_facts()) == 2


def test_budget_is_never_exceeded(wrap, facts, tmp_path):
    model, tokenizer = wrap(norm_budget=0.02)

    def shares(edited):
        layers = edited.edit_layers().values()
        return [float(layer.get_delta("default").double().norm()) / layer.base_norm() for layer in layers]

    report = edit(model, facts[:12], tokenizer, batch_size=6)
    assert all(module.budget_binding for module in report.modules)
    assert shares(model) == pytest.approx([0.02] * len(shares(model)), rel=1e-5)
    model.remove_facts(model.edited_facts()[0])
    assert max(shares(model)) <= 0.02 * (1 + 1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_tiny_model()[0], tmp_path)
    assert shares(loaded) == pytest.approx(shares(model), rel=1e-6)
    model.set_norm_budget(0.01)
    assert shares(model) == pytest.approx([0.01] * len(shares(model)), rel=1e-5)
    model.set_norm_budget(None)
    free = shares(model)
    assert min(free) > 0.02
    model.set_norm_penalty(50.0)
    assert max(shares(model)) < min(free)
    with pytest.raises(ValueError, match="norm_budget must be"):
        model.set_norm_budget(-1)
    assert model.peft_config["default"].norm_budget is None


@pytest.mark.parametrize("stage", ["search_targets", "SubjectReader", "module_solution", "score_targets"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_batch_is_all_or_nothing(wrap, facts, monkeypatch, stage, error):
    module = spreading if stage == "SubjectReader" else editing
    model, tokenizer = wrap(target_modules=["mlp.down_proj"], layers_to_transform=[0, 1])
    edit(model, facts[:3], tokenizer)
    before, held, memory = deltas(model), model.edited_facts(), model.peft_config["default"].memory
    calls = {"left": 1}
    real = getattr(module, stage)

    def failing(*args, **kwargs):
        calls["left"] -= 1
        if calls["left"] < 0 or stage in ("search_targets", "SubjectReader", "score_targets"):
            raise error("in the middle")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, stage, failing)
    with pytest.raises(error):
        edit(model, facts[2:6], tokenizer)
    assert all(torch.equal(before[name], delta) for name, delta in deltas(model).items())
    assert model.edited_facts() == held and model.peft_config["default"].memory is memory
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_facts_change_nothing(wrap, facts):
    model, tokenizer = wrap()
    edit(model, facts[:3], tokenizer)
    before = deltas(model)
    for bad, said in [
        ([facts[4], Fact("Paris", "no placeholder", "Rome")], "fact 1"),
        ([facts[4], Fact("Paris", "{} is in " + "very " * 300 + "far", "Rome")], "fact 1.*context window"),
        ([Fact("Paris", "{} is in", "Rome"), Fact("Paris", "{} is in", "Oslo")], "contradict"),
        ([Fact("Paris", "{} is in", "Rome", id=facts[0].fact_id)], "another fact"),
        ([], "no facts"),
    ]:
        with pytest.raises(FactError, match=said):
            edit(model, bad, tokenizer)
    assert all(torch.equal(before[name], delta) for name, delta in deltas(model).items())
    assert len(model.edited_facts()) == 3


def test_nan_weights_are_named_and_strict_rolls_back(wrap, facts):
    model, tokenizer = wrap()
    with torch.no_grad():
        model.base_model.model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    before = deltas(model)
    with pytest.raises(ValueError, match="not finite before anything is changed"):
        edit(model, facts[:3], tokenizer)
    assert all(torch.equal(before[name], delta) for name, delta in deltas(model).items())


def test_a_diverging_fact_is_left_out_or_strict(wrap, facts):
    model, tokenizer = wrap()
    token = tokenizer("Zyx")["input_ids"][-1]
    bad = Fact("Zyx", "{} is in", "Rome")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        model.base_model.model.lm_head.weight = torch.nn.Parameter(embedding.clone())
        embedding[token] = torch.nan
    good = [fact for fact in facts[:30] if token not in tokenizer(f"{fact.filled_prompt} {fact.target}")["input_ids"]][
        :3
    ]
    with pytest.raises(ValueError, match="rolled back"):
        edit(model, [*good, bad], tokenizer, strict=True)
    assert model.edited_facts() == []
    with pytest.warns(UserWarning, match="diverged for 1 fact"):
        report = edit(model, [*good, bad], tokenizer)
    assert [fact.written for fact in report.facts] == [True] * 3 + [False]
    assert [record.subject for record in model.edited_facts()] == [fact.subject for fact in good]


def test_the_adapter_must_be_in_a_state_that_can_be_edited(wrap, facts, tmp_path):
    model, tokenizer = wrap()
    edit(model, facts[:2], tokenizer)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        edit(model, facts[2:4], tokenizer)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="disabled"):
        edit(model, facts[2:4], tokenizer)
    with pytest.raises(ValueError, match="no edit adapter 'other'"):
        edit(model, facts[2:4], tokenizer, adapter_name="other")
    model.peft_config["default"].save_memory = False
    model.save_pretrained(tmp_path)
    assert not any("memory" in path.name or "facts" in path.name for path in tmp_path.iterdir())
    loaded = PeftModel.from_pretrained(load_tiny_model()[0], tmp_path).eval()
    assert torch.equal(logits(loaded, tokenizer), logits(model, tokenizer))
    with pytest.raises(RuntimeError, match="no edit memory"):
        edit(loaded, facts[2:4], tokenizer)
    with pytest.raises(ValueError, match="batch_size"):
        edit(model, facts[2:4], tokenizer, batch_size=0)


def test_edit_memories_of_disjoint_adapters_add_up(wrap, facts, tiny_statistics):
    model, tokenizer = wrap()
    edit(model, facts[:4], tokenizer)
    model.add_adapter("second", EditConfig(task_type="CAUSAL_LM", num_contexts=2))
    model.set_adapter("second")
    model.set_statistics(tiny_statistics)
    edit(model, facts[4:8], tokenizer)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="memory")
    model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum")
    model.set_adapter("both")
    assert [record.subject for record in model.edited_facts()] == [fact.subject for fact in facts[:8]]
    assert model.peft_config["sum"].memory is None
    for layer in model.edit_layers("sum").values():
        expected = layer.get_delta("default") + 0.5 * layer.get_delta("second")
        assert torch.allclose(layer.get_delta("sum"), expected)
    with pytest.raises(ValueError, match="same facts"):
        model.add_weighted_adapter(["default", "both"], [1.0, 1.0], "again", combination_type="memory")
    assert "again" not in model.peft_config
    model.remove_facts(facts[0])
    assert len(model.edited_facts()) == 7


def test_half_precision_base_and_a_lora_beside(wrap, facts):
    model, tokenizer = wrap(dtype=torch.bfloat16)
    report = edit(model, facts[:10], tokenizer)
    assert report.recalled >= 6
    assert all(layer.get_delta("default").dtype == torch.float32 for layer in model.edit_layers().values())

    base, tokenizer = load_tiny_model()
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).merge_and_unload()
    stacked = get_peft_model(lora, EditConfig(task_type="CAUSAL_LM", num_contexts=1)).eval()
    with pytest.warns(UserWarning, match="No key statistics"):
        assert edit(stacked, facts[:4], tokenizer).written == 4


def test_deepcopy_is_independent(wrap, facts):
    model, tokenizer = wrap()
    edit(model, facts[:3], tokenizer)
    twin = copy.deepcopy(model)
    before = logits(twin, tokenizer)
    edit(model, facts[3:6], tokenizer)
    assert torch.equal(logits(twin, tokenizer), before) and len(twin.edited_facts()) == 3
    twin.remove_facts(twin.edited_facts())
    assert len(model.edited_facts()) == 6
