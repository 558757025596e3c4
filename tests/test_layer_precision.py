"""Multiplying in the base's dtype: as precise as merging, and never with a delta that has since changed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_edit.layer import EditLinear

from .edit_layers import D_IN, D_OUT, RANDOM, edited, kinds


narrow = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)


def follows(layer: EditLinear) -> bool:
    """Whether the output is that of the delta as it is now, at a tolerance far below the delta's own share."""
    x = torch.randn(64, D_IN).to(layer.base_layer.weight.dtype)
    expected = layer.base_layer(x).double() + x.double() @ layer.get_delta("default").double().T
    return bool(((layer(x) - expected).norm() / (expected - layer.base_layer(x)).norm()) < 0.3)


def large_delta() -> torch.Tensor:
    return torch.randn(D_OUT, D_IN)


@kinds
@narrow
def test_unmerged_is_as_precise_as_merged(kind, dtype):
    torch.manual_seed(0)
    base = (nn.Linear(256, 64) if kind == "linear" else Conv1D(64, 256)).to(dtype)
    layer = EditLinear(base, "default", RANDOM).requires_grad_(False)
    x = torch.randn(32, 256, dtype=dtype)
    weight = base.weight.double() if kind == "linear" else base.weight.double().T
    expected = x.double() @ (weight + layer.get_delta("default").double()).T + base.bias.double()
    with torch.no_grad():
        unmerged = layer(x)
        layer.merge()
        merged = layer(x)
    assert unmerged.dtype == dtype
    assert (unmerged - expected).norm() < 1.2 * (merged - expected).norm()


def test_a_float32_base_needs_no_copy_and_a_narrow_one_keeps_it():
    wide, layer = edited(), edited(dtype=torch.bfloat16)
    wide(torch.randn(2, D_IN))
    assert not wide._compute_copies
    x = torch.randn(2, D_IN, dtype=torch.bfloat16)
    layer(x)
    first, _ = layer._compute_copies["default"]
    layer(x)
    assert layer._compute_copies["default"][0] is first
    assert not any("copies" in key for key in layer.state_dict())


def change_in_place(layer):
    layer.get_delta("default").mul_(-3)


def change_a_value(layer):
    with torch.inference_mode():
        layer.edit_delta["default"].weight[:] = large_delta()


def change_by_loading(layer, assign=False):
    layer.load_state_dict({**layer.state_dict(), "edit_delta.default.weight": large_delta()}, assign=assign)
    layer.requires_grad_(False)


def change_by_training(layer):
    weight = layer.edit_delta["default"].weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    layer(torch.randn(2, D_IN, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    layer.requires_grad_(False)


def change_the_adapter(layer):
    layer.delete_adapter("default")
    layer.update_layer("default", RANDOM)
    layer.set_adapter("default")


changes = {
    "set_delta": lambda layer: layer.set_delta("default", large_delta()),
    "set to zero": lambda layer: layer.set_delta("default", torch.zeros(D_OUT, D_IN)),
    "data": lambda layer: setattr(layer.edit_delta["default"].weight, "data", large_delta()),
    "in place": change_in_place,
    "in inference mode": change_a_value,
    "load": change_by_loading,
    "load, assigned": lambda layer: change_by_loading(layer, assign=True),
    "train": change_by_training,
    "delete": change_the_adapter,
    "dtype": lambda layer: layer.to(torch.float32),
}


@pytest.mark.parametrize("change", changes.values(), ids=changes)
@pytest.mark.parametrize("grad", (True, False))
def test_no_output_is_of_a_delta_that_was(change, grad):
    torch.manual_seed(0)
    layer = edited(dtype=torch.bfloat16)
    layer.set_delta("default", large_delta())
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            assert follows(layer)
            with torch.enable_grad():
                change(layer)
            if bool(layer.get_delta("default").any()):
                assert follows(layer)
            else:
                x = torch.randn(2, D_IN, dtype=torch.bfloat16)
                assert torch.equal(layer(x), layer.base_layer(x))
            layer.set_delta("default", large_delta())


def test_an_adapter_switch_is_seen_and_both_copies_stay():
    layer = edited(dtype=torch.bfloat16, adapters=("default", "other"))
    layer.set_delta("default", large_delta())
    x = torch.randn(8, D_IN, dtype=torch.bfloat16)
    outputs = {}
    for name in ("default", "other", "default"):
        layer.set_adapter(name)
        layer.requires_grad_(False)
        output = layer(x)
        assert torch.equal(outputs.setdefault(name, output), output)
    assert not torch.equal(outputs["default"], outputs["other"])
    assert set(layer._compute_copies) == {"default", "other"}
    layer.delete_adapter("other")
    assert set(layer._compute_copies) == {"default"}
    layer.merge()
    assert not layer._compute_copies


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))))
def test_a_copied_layer_has_copies_of_its_own(duplicate):
    layer = edited(dtype=torch.bfloat16)
    layer.set_delta("default", large_delta())
    assert follows(layer)
    other = duplicate(layer)
    assert not other._compute_copies and layer._compute_copies
    other.set_delta("default", large_delta())
    assert follows(other) and follows(layer)


@narrow
def test_the_gradient_reaches_the_input_also_after_inference_mode(dtype):
    torch.manual_seed(0)
    layer = edited(dtype=dtype)
    layer.set_delta("default", large_delta())
    x = torch.randn(3, 5, D_IN, dtype=dtype)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_(True)
    layer(x).sum().backward()
    expected = (layer.base_layer.weight.double() + layer.get_delta("default").double()).sum(0)
    torch.testing.assert_close(x.grad, expected.expand_as(x).to(dtype), atol=5e-2, rtol=2e-2)


def test_a_hook_on_the_delta_and_a_trained_delta_are_called():
    layer, x = edited(dtype=torch.bfloat16), torch.randn(3, D_IN, dtype=torch.bfloat16)
    calls = []
    handle = layer.edit_delta["default"].register_forward_hook(lambda *_: calls.append(1))
    layer(x)
    assert calls and not layer._compute_copies
    handle.remove()
    with torch.no_grad():
        layer.edit_delta["default"].weight.requires_grad_(True)
        layer(x)
    assert len(calls) == 1 and layer._compute_copies
    layer(x).sum().backward()
    assert layer.edit_delta["default"].weight.grad is not None and not layer._compute_copies


@pytest.mark.parametrize("enabled", (True, False))
def test_autocast(enabled):
    torch.manual_seed(0)
    layer = edited()
    layer.set_delta("default", large_delta())
    x = torch.randn(4, D_IN)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        output = layer(x)
    assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
    torch.testing.assert_close(output.float(), expected, atol=5e-2, rtol=2e-2)


def test_compiled_sees_a_new_delta():
    layer = edited(dtype=torch.bfloat16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(4, D_IN, dtype=torch.bfloat16)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), layer(x), atol=5e-2, rtol=2e-2)
        layer.set_delta("default", large_delta())


@pytest.mark.parametrize("shape", ((D_IN,), (0, D_IN), (2, 3, 5, D_IN)))
def test_any_number_of_dimensions(shape):
    layer = edited(dtype=torch.bfloat16)
    assert layer(torch.randn(shape, dtype=torch.bfloat16)).shape == (*shape[:-1], D_OUT)
