"""A delta that is not the solution of the adapter's edit memory is noticed, before an edit would lose it."""

import copy
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from peft_edit import EditConfig

from .models import build_model
from .world import texts, town_facts, word_tokenizer


FOREIGN = "has a delta that is not the solution of its edit memory of {} facts"


def wrapped(facts=(), **settings):
    config = EditConfig(
        **{"task_type": "CAUSAL_LM", "layers_to_transform": [0, 1], "num_contexts": 1, "search_steps": 3, **settings}
    )
    model = get_peft_model(build_model("llama"), config).eval()
    model.collect_statistics(texts(), word_tokenizer())
    edit(model, facts)
    return model


def edit(model, facts):
    if facts:
        model.edit_facts(facts, word_tokenizer(), progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two saved adapters with three facts each, which are not the same."""
    folder, facts = tmp_path_factory.mktemp("adapters"), town_facts(6)
    for name, own in (("a", facts[:3]), ("b", facts[3:])):
        wrapped(own).save_pretrained(folder / name)
    return folder


@pytest.fixture
def both(folders):
    model = PeftModel.from_pretrained(build_model("llama"), folders / "a", adapter_name="a")
    model.load_adapter(folders / "b", "b")
    return model


def test_weights_of_another_adapter_do_not_go_under_its_memory(folders):
    model = PeftModel.from_pretrained(build_model("llama"), folders / "a")
    before = copy.deepcopy(get_peft_model_state_dict(model))
    with pytest.raises(ValueError, match="are not of the same edits. Load the file with the edit memory that it was"):
        model.load_adapter(folders / "b", "default")
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.load_adapter(folders / "a", "default")  # the same ones may be loaded again
    edit(model, town_facts(6)[3:4])


def test_a_directory_of_two_adapters_is_refused(folders, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(folders / "a", mixed)
    shutil.copy(folders / "b" / "adapter_model.safetensors", mixed)
    with pytest.raises(ValueError, match="are not of the same edits"):
        PeftModel.from_pretrained(build_model("llama"), mixed)


def test_loaded_weights_without_their_memory_are_not_edited_away(folders):
    weights = get_peft_model_state_dict(PeftModel.from_pretrained(build_model("llama"), folders / "a"))
    model = wrapped()  # has statistics, and no facts
    set_peft_model_state_dict(model, weights)
    with pytest.raises(RuntimeError, match=FOREIGN.format(0)):
        edit(model, town_facts(1))
    assert all(torch.equal(weights[name], value) for name, value in get_peft_model_state_dict(model).items())


def test_a_config_with_facts_but_without_weights_is_not_edited(folders):
    model = get_peft_model(build_model("llama"), EditConfig.from_pretrained(folders / "a"))
    with pytest.raises(RuntimeError, match=FOREIGN.format(3) + r".*norm 0 instead of .*PeftModel.from_pretrained"):
        edit(model, town_facts(1))


def test_a_trained_delta_is_not_solved_away():
    model = wrapped(town_facts(2), trainable=True)
    edit(model, town_facts(3)[2:])
    with torch.no_grad():
        next(iter(model.edit_layers().values())).edit_delta["default"].weight.mul_(1.5)
    for change in (lambda: edit(model, town_facts(4)[3:]), lambda: model.set_norm_budget(0.1)):
        with pytest.raises(RuntimeError, match=FOREIGN.format(3)):
            change()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rounding_to_the_adapter_s_dtype_is_no_foreign_delta(tmp_path, dtype):
    config = EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1], num_contexts=1, search_steps=3)
    model = get_peft_model(build_model("llama", dtype), config, autocast_adapter_dtype=False).eval()
    model.collect_statistics(texts(), word_tokenizer())
    edit(model, town_facts(2))
    edit(model, town_facts(3)[2:])
    model.save_pretrained(tmp_path)
    for autocast in (True, False):
        base = build_model("llama", torch.bfloat16)
        edit(PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast), town_facts(4)[3:])


def test_a_linear_mix_of_loaded_adapters_has_no_memory(both):
    both.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix", "linear")
    both.set_adapter("mix")
    assert both.edited_facts() == []
    with pytest.raises(RuntimeError, match="'mix' has a delta but no edit memory"):
        edit(both, town_facts(7)[6:])


def test_a_linear_mix_stays_where_the_adapter_was_located():
    config = EditConfig(task_type="CAUSAL_LM", layers_to_transform="auto", num_contexts=1, search_steps=3)
    model = get_peft_model(build_model("llama"), config).eval()
    model.locate_layers(town_facts(3), word_tokenizer(), count=2, tracing=False)
    model.collect_statistics(texts(), word_tokenizer())
    edit(model, town_facts(2))
    model.base_model.add_weighted_adapter(["default"], [1.0], "copy")
    whole, copied = model.base_model.edit_layers("default"), model.base_model.edit_layers("copy")
    assert len(whole) == 2 and list(whole) == list(copied)
    assert all(torch.equal(layer.get_delta("default"), layer.get_delta("copy")) for layer in copied.values())


def test_a_mix_that_fails_leaves_nothing(both, monkeypatch):
    def fail(*_args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("peft_edit.combining.solve_all", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        both.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix", "memory")
    assert set(both.peft_config) == {"a", "b"} and not both.base_model.edit_layers("mix")
    assert both.active_adapters == ["a"]


def test_facts_are_listed_whatever_the_adapter_s_state(both):
    assert len(both.edited_facts("b")) == 3  # not the active one
    both.merge_adapter()
    assert len(both.edited_facts()) == 3
    both.unmerge_adapter()
    with both.disable_adapter():
        assert len(both.edited_facts("a")) == 3
