"""A model's weights as PEFT handles them: merged and restored bit for bit, unloaded, kept narrow, offloaded."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_edit.architectures import find_blocks

from .models import NUM_LAYERS, build_model
from .random_adapters import deltas, dtypes, logits, random_adapter, random_config, same_deltas, some


# --- merging -----------------------------------------------------------------------------------------------------


@some
@dtypes
def test_merge_and_unmerge_restore_the_base_bit_for_bit(family, dtype):
    model = random_adapter(family, dtype)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unmerged = logits(model)
    model.merge_adapter(safe_merge=True)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(logits(model), unmerged, atol=tolerance, rtol=tolerance)
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model.unmerge_adapter()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), unmerged)


@some
@pytest.mark.parametrize("safe_merge", (False, True))
def test_merge_and_unload_is_a_plain_model(family, safe_merge, tmp_path):
    model = random_adapter(family)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert not any("edit" in name for name, _ in merged.named_modules())
    assert merged.state_dict().keys() == build_model(family).state_dict().keys()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))


def test_merging_chosen_adapters():
    model = random_adapter("llama")
    model.add_adapter("second", random_config())
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    torch.testing.assert_close(
        logits(copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])), both, atol=1e-5, rtol=1e-5
    )
    model.set_adapter("second")
    torch.testing.assert_close(
        logits(copy.deepcopy(model).merge_and_unload(adapter_names=["second"])), logits(model), atol=1e-5, rtol=1e-5
    )


def test_safe_merge_refuses_broken_weights():
    model = random_adapter("llama")
    layer = list(model.base_model.edit_layers().values())[-1]
    layer.set_delta("default", torch.full_like(layer.get_delta("default"), torch.nan))
    weight = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@some
def test_unload_gives_the_base_back(family):
    base = build_model(family)
    expected = logits(base)
    unloaded = random_adapter(family).unload()
    assert unloaded.state_dict().keys() == build_model(family).state_dict().keys()
    assert torch.equal(logits(unloaded), expected)


# --- where models live -------------------------------------------------------------------------------------------


def test_low_cpu_mem_usage_leaves_nothing_on_meta_and_rounds_nothing(tmp_path):
    model = random_adapter("llama", torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama", torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    for name in ("default", "second"):
        assert same_deltas(deltas(loaded, name), deltas(model))
    assert deltas(loaded)["model.layers.0.mlp.down_proj"].dtype == torch.float32


@pytest.mark.parametrize("autocast", (True, False))
def test_adapter_dtype_on_request(autocast):
    model = get_peft_model(build_model("llama", torch.bfloat16), random_config(), autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else torch.bfloat16
    assert {delta.dtype for delta in deltas(model).values()} == {expected}
    assert torch.isfinite(logits(model)).all()


def check_offloaded(loaded: PeftModel, model: PeftModel) -> None:
    """`loaded` is `model` with its weights offloaded, and can be read, changed, and merged as such."""
    expected = logits(model)
    with model.disable_adapter():
        without = logits(model)
    torch.testing.assert_close(logits(loaded), expected)
    assert same_deltas(deltas(loaded), deltas(model))
    layers = loaded.base_model.edit_layers()
    assert any(layer.edit_delta["default"].weight.device.type == "meta" for layer in layers.values())
    norms = {name: layer.base_norm() for name, layer in model.base_model.edit_layers().items()}
    assert {name: layer.base_norm() for name, layer in layers.items()} == pytest.approx(norms)

    kept = deltas(loaded)
    for layer in layers.values():
        layer.set_delta("default", torch.zeros(layer.out_features, layer.in_features))
    torch.testing.assert_close(logits(loaded), without)
    for name, layer in layers.items():
        layer.set_delta("default", kept[name])
    torch.testing.assert_close(logits(loaded), expected)

    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    loaded.unmerge_adapter()
    torch.testing.assert_close(logits(loaded), expected)
    assert same_deltas(deltas(loaded), deltas(model))


@pytest.mark.parametrize("family", ("llama", "gpt2", "opt"))
def test_offloaded_to_cpu(family):
    model = random_adapter(family)
    loaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    check_offloaded(loaded, model)


@pytest.mark.parametrize("family", ("llama", "opt"))
def test_loaded_with_a_device_map_onto_disk(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT's disk offload writes below the working directory
    model = random_adapter(family)
    model.save_pretrained("edits")
    build_model(family).save_pretrained("base")
    blocks = find_blocks(build_model(family))[0]
    above = blocks.split(".")
    device_map = {f"{blocks}.{index}": "disk" if index == 1 else "cpu" for index in range(NUM_LAYERS)}
    for depth in range(len(above)):  # beside the blocks, everything stays
        parent = build_model(family).get_submodule(".".join(above[:depth]))
        names = [name for name, _ in parent.named_children() if name != above[depth]]
        device_map |= {".".join([*above[:depth], name]): "cpu" for name in names}
    base = AutoModelForCausalLM.from_pretrained("base", device_map=device_map, offload_folder="offload")
    assert base.get_submodule(f"{blocks}.1").self_attn.q_proj.weight.device.type == "meta"
    device_map = {f"base_model.model.{name}": device for name, device in device_map.items()}
    loaded = PeftModel.from_pretrained(base, "edits", device_map=device_map, offload_folder="offload_edits").eval()
    check_offloaded(loaded, model)
