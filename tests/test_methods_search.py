"""LTI, norm anchors and value gradients as methods of an adapter: saving, sharing the work, settings, presets."""

import pytest
import torch
from peft import PeftModel

from peft_edit import EditConfig
from peft_edit.methods import METHODS
from peft_edit.tiny import load_tiny_model
from peft_edit.workers import Workers

from .method_run import TWO_LAYERS, deltas, edit, memory_of, same


pytest_plugins = "tests.method_run"


CASES = {
    "nas": {"method": "nas"},
    "anchored ridge on two layers": {"value_norm": "anchored", **TWO_LAYERS},
    "lti": {"lti": True},
    "lti on two layers": {"lti": True, **TWO_LAYERS},
    "ultraedit": {"method": "ultraedit"},
    "ultraedit on two layers": {"method": "ultraedit", "preservation_weight": "auto", **TWO_LAYERS},
    "ultraedit with a budget": {"method": "ultraedit", "norm_budget": 0.05},
}


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


def test_presets():
    nas = EditConfig.from_method("nas")
    assert (nas.update, nas.value_norm, nas.search_optimizer) == ("null_space", "anchored", "adam")
    ultra = EditConfig.from_method("ultraedit", update_settings={"learning_rate": 0.1})
    assert (ultra.update, ultra.preservation_weight, ultra.norm_penalty) == ("normalized", 0.0, 1.0)
    assert ultra.update_rule().learning_rate == 0.1 and ultra.refinement_rounds == 0
    assert EditConfig.from_method("emmet", lti=True, value_norm=4.0, norm_budget=0.1).lti
    assert {"nas", "ultraedit"} <= set(METHODS)
