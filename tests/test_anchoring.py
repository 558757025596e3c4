"""Norm anchors (NAS): values of the unedited model's norm, by the published equation and in the adapter."""

import json

import pytest
import torch

from peft_edit import EditMemory
from peft_edit.anchoring import anchor_norm, anchored
from peft_edit.editing import FactEditor
from peft_edit.residual import ResidualPath
from peft_edit.search import SearchResult

from .method_run import TWO_LAYERS, deltas, edit, memory_of, normal


pytest_plugins = "tests.method_run"


def result(outputs, increments, targets, failed=None):
    count = len(outputs)
    zeros = torch.zeros(count)
    failed = torch.zeros(count, dtype=torch.bool) if failed is None else failed
    return SearchResult(increments, targets, zeros[:, None, None], zeros.long(), failed, zeros, failed, outputs)


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


# --- in the adapter ------------------------------------------------------------------------------------------------


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
