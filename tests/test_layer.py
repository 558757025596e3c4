"""The layer: y = W0 x + Δ x, its delta, merging and the base weight."""

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from peft_edit import EditConfig
from peft_edit.layer import EditLinear

from .edit_layers import D_IN, D_OUT, RANDOM, base_layer, dtypes, edited, kinds


@kinds
@dtypes
def test_a_new_adapter_changes_no_bit(kind, dtype):
    base = base_layer(kind, dtype)
    x = torch.randn(3, 5, D_IN, dtype=dtype)
    before = base(x)
    layer = EditLinear(base, "default", EditConfig())
    assert torch.equal(layer(x), before)
    assert not layer.get_delta("default").any()


@kinds
def test_forward_adds_every_active_delta(kind):
    layer = edited(kind, adapters=("a", "b"))
    x = torch.randn(3, 5, D_IN)
    base = layer.base_layer(x)
    total = base + x @ layer.get_delta("a").T + x @ layer.get_delta("b").T
    torch.testing.assert_close(layer(x), total)
    layer.set_adapter("b")
    torch.testing.assert_close(layer(x), base + x @ layer.get_delta("b").T)


@dtypes
def test_the_delta_is_at_least_float32_and_the_output_keeps_the_base_dtype(dtype):
    layer = edited(dtype=dtype)
    assert layer.get_delta("default").dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer(torch.randn(2, D_IN, dtype=dtype)).dtype == dtype


@kinds
def test_get_delta_is_a_view_in_linear_layout(kind):
    layer = edited(kind)
    delta = layer.get_delta("default")
    assert delta.shape == (D_OUT, D_IN) and not delta.requires_grad
    assert delta.data_ptr() == layer.edit_delta["default"].weight.data_ptr()
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape
    assert (layer.in_features, layer.out_features) == (D_IN, D_OUT)


def test_set_delta_casts_and_leaves_the_old_tensor_for_a_rollback():
    layer = edited()
    old = layer.get_delta("default")
    copy = old.clone()
    new = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    layer.set_delta("default", new)
    assert torch.equal(old, copy)
    assert torch.equal(layer.get_delta("default"), new.float())
    layer.set_delta("default", old)
    assert torch.equal(layer.get_delta("default"), copy)


def test_set_delta_refuses_a_wrong_shape_and_a_merged_adapter():
    layer = edited(adapters=("a", "b"))
    with pytest.raises(ValueError, match="shape"):
        layer.set_delta("a", torch.zeros(D_IN, D_OUT))
    layer.merge(adapter_names=["a"])
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.set_delta("a", torch.zeros(D_OUT, D_IN))
    layer.set_delta("b", torch.zeros(D_OUT, D_IN))
    assert not layer.get_delta("b").any()


@kinds
@dtypes
def test_merge_then_unmerge_restores_every_bit(kind, dtype):
    layer = edited(kind, dtype, adapters=("a", "b"))
    x = torch.randn(3, D_IN, dtype=dtype)
    weight, output = layer.base_layer.weight.clone(), layer(x)
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"])
    assert not torch.equal(layer.base_layer.weight, weight)
    assert layer.base_layer.weight.dtype == dtype
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(layer(x), output, atol=tolerance, rtol=tolerance)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged
    assert torch.equal(layer(x), output)


def test_merge_takes_active_adapters_once():
    layer = edited()
    layer.merge()
    merged = layer.base_layer.weight.clone()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        layer.merge()
    assert torch.equal(layer.base_layer.weight, merged) and layer.merged_adapters == ["default"]


def test_unmerging_twice_warns():
    with pytest.warns(UserWarning, match="Already unmerged"):
        edited().unmerge()


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_safe_merge_names_the_broken_adapter_and_changes_nothing(value):
    layer = edited(adapters=("good", "bad"))
    layer.set_delta("bad", torch.full((D_OUT, D_IN), value))
    weight = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="The adapter bad seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged
    layer.merge()  # unsafe, as asked for, and still taken back exactly
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("order", ("edit first", "lora first"))
@pytest.mark.parametrize("lora_outside", (True, False))
def test_merging_around_a_lora_on_the_same_weight_does_not_keep_the_lora(order, lora_outside):
    """The weight kept at merge time may hold what another adapter type merged; it must not come back for good."""
    torch.manual_seed(0)
    lora_config = LoraConfig(r=2, init_lora_weights=False)
    base = base_layer()
    weight = base.weight.clone()
    if lora_outside:
        edit = edited()
        lora = LoraLinear(edit, "default", lora_config, r=2, lora_alpha=4)
        base = edit.base_layer
    else:
        lora = LoraLinear(base, "default", lora_config, r=2, lora_alpha=4)
        edit = EditLinear(lora, "default", RANDOM)
    layers = [edit, lora] if order == "edit first" else [lora, edit]
    for layer in layers:
        layer.merge()
    assert (base.weight - weight).abs().max() > 1e-3
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(base.weight, weight, atol=1e-6, rtol=0)


class QuantisedLinear(nn.Linear):
    """8-bit steps, the scale beside the weight."""

    def __init__(self, source: nn.Linear):
        super().__init__(source.in_features, source.out_features)
        self.bias.data = source.bias.data.clone()
        self.quantise(source.weight.data)

    def quantise(self, weight: torch.Tensor) -> None:
        self.scale = weight.abs().max() / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class QuantisedBackend:
    """Writes into the module, or replaces it whole, as PEFT's backends do."""

    def __init__(self, replaces: bool):
        self.replaces = replaces

    def get_base_weight(self, base):
        return base.weight * base.scale

    def set_base_weight(self, layer, weight):
        if self.replaces:
            layer.base_layer = copy.deepcopy(layer.base_layer)
        layer.get_base_layer().quantise(weight)


@pytest.mark.parametrize("replaces", (False, True))
def test_quantised_base(replaces, monkeypatch):
    monkeypatch.setattr("peft_edit.layer.resolve_quantization_backend", lambda *_, **__: QuantisedBackend(replaces))
    layer = EditLinear(QuantisedLinear(base_layer()), "default", RANDOM).requires_grad_(False)
    x = torch.randn(3, D_IN)
    base = layer.base_layer
    weight, scale, norm, output = base.weight.clone(), base.scale.clone(), layer.base_norm(), layer(x)
    names = layer.state_dict().keys()
    assert layer.get_delta("default").dtype == torch.float32
    for _ in range(2):
        layer.merge(safe_merge=True)
        torch.testing.assert_close(layer(x), output, atol=2e-2, rtol=0)
        assert not torch.equal(layer.base_layer.weight, weight)
        assert layer.base_norm() == norm and layer.state_dict().keys() == names
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, weight) and torch.equal(layer.base_layer.scale, scale)
        assert torch.equal(layer(x), output) and layer.base_norm() == norm


def test_disabling_adapters_gives_the_base_also_when_merged():
    layer = edited()
    x = torch.randn(3, D_IN)
    base = layer.base_layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    assert not torch.allclose(layer(x), base)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base) and not layer.merged


@kinds
def test_each_sample_with_its_own_adapter(kind):
    layer = edited(kind, adapters=("a", "b"))
    x = torch.randn(6, 5, D_IN)
    names = ["a", "__base__", "b"]
    result = layer(x, adapter_names=names)  # two beams each
    for rows, name in ((slice(0, 2), "a"), (slice(2, 4), None), (slice(4, 6), "b")):
        expected = layer.base_layer(x[rows])
        if name is not None:
            expected = expected + x[rows] @ layer.get_delta(name).T
        torch.testing.assert_close(result[rows], expected)
    with pytest.raises(ValueError, match="adapter_names"):
        layer(x[:5], adapter_names=names)
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer(x, adapter_names=names)


@kinds
@dtypes
def test_base_norm_is_that_of_the_unedited_weight(kind, dtype):
    layer = edited(kind, dtype)
    expected = float(layer.base_layer.weight.double().norm())
    assert layer.base_norm() == pytest.approx(expected, rel=1e-12)
    layer.merge()
    assert float(layer.base_layer.weight.double().norm()) != pytest.approx(expected, rel=1e-6)
    assert layer.base_norm() == pytest.approx(expected, rel=1e-12)


def test_offloaded_layer_reads_sets_and_measures():
    layer = edited()
    x = torch.randn(3, D_IN)
    delta, norm, output = layer.get_delta("default").clone(), layer.base_norm(), layer(x)
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.edit_delta["default"].weight.device.type == "meta"
    assert torch.equal(layer.get_delta("default"), delta)
    assert layer.base_norm() == norm
    assert torch.equal(layer(x), output)
    old = layer.get_delta("default")
    layer.set_delta("default", 2 * delta)
    assert torch.equal(old, delta)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ (2 * delta).T)


def test_meta_weights_that_nobody_offloaded_are_an_error():
    with torch.device("meta"):
        layer = EditLinear(nn.Linear(D_IN, D_OUT), "default", EditConfig())
    with pytest.raises(RuntimeError, match="meta"):
        layer.get_delta("default")


def test_frozen_unless_asked_for():
    frozen = EditLinear(base_layer(), "default", EditConfig())
    trained = EditLinear(base_layer(), "default", EditConfig(trainable=True))
    assert not frozen.edit_delta["default"].weight.requires_grad
    assert trained.edit_delta["default"].weight.requires_grad
    for layer in (frozen, trained):
        layer.set_adapter("default")
    assert not frozen.edit_delta["default"].weight.requires_grad
    assert trained.edit_delta["default"].weight.requires_grad
    assert "default" not in EditLinear.frozen_peft_weight_names  # the class's own dict stays empty


def test_gradients_reach_delta_and_input():
    layer = EditLinear(base_layer(), "default", EditConfig(trainable=True))
    x = torch.randn(3, D_IN, requires_grad=True)
    layer(x).sum().backward()
    assert layer.edit_delta["default"].weight.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_name_and_lora_conversion():
    layer = edited()
    assert repr(layer).startswith("edit.EditLinear")
    assert layer.supports_lora_conversion("default")
