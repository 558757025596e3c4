"""What PEFT asks of every adapter type, over tiny models of several families: nothing here knows about facts."""

import copy
import json
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_edit import EditConfig, EditLinear
from peft_edit.architectures import find_blocks

from .models import FAMILIES, NUM_LAYERS, build_model


SOME = ("gpt2", "opt", "gpt_neox", "llama", "qwen2")  # Conv1D, biases, parallel and gated MLPs, tied heads
some = pytest.mark.parametrize("family", SOME)
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
TOKENS = torch.tensor([[5, 9, 13, 7], [8, 3, 6, 11]])


def random_config(**changes) -> EditConfig:
    """An adapter on every block whose delta is random, so that it can be told from none."""
    return EditConfig(
        **{"task_type": "CAUSAL_LM", "layers_to_transform": list(range(NUM_LAYERS)), "init_weights": False, **changes}
    )


def random_adapter(family: str, dtype: torch.dtype = torch.float32, **changes) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(build_model(family, dtype), random_config(**changes)).eval()


@torch.no_grad()
def logits(model: nn.Module, **options) -> torch.Tensor:
    return model(TOKENS, **options).logits


def deltas(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    return {name: layer.get_delta(adapter_name) for name, layer in model.base_model.edit_layers(adapter_name).items()}


def same_deltas(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    same_dtypes = all(left[name].dtype == right[name].dtype for name in left)
    return left.keys() == right.keys() and same_dtypes and all(torch.equal(left[name], right[name]) for name in left)


# --- injection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_no_logit_and_trains_nothing(family):
    base = build_model(family)
    before = logits(base)
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert 1 <= len(model.base_model.edit_layers()) < NUM_LAYERS


def test_edit_layers_are_in_the_order_of_the_forward_pass_and_named_as_in_the_base_model():
    base = build_model("llama", num_hidden_layers=12)
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(12)]
    model = get_peft_model(base, EditConfig(target_modules=["down_proj"]))
    assert list(model.base_model.edit_layers()) == names
    assert all(isinstance(base.get_submodule(name), EditLinear) for name in names)
    assert not model.base_model.edit_layers("other")


def test_named_layers_and_excluded_modules():
    model = get_peft_model(build_model("llama"), EditConfig(layers_to_transform=[0, 2]))
    assert list(model.base_model.edit_layers()) == [f"model.layers.{index}.mlp.down_proj" for index in (0, 2)]
    excluded = EditConfig(target_modules=["down_proj"], exclude_modules=["layers.1.mlp.down_proj"])
    model = get_peft_model(build_model("llama"), excluded)
    assert list(model.base_model.edit_layers()) == [f"model.layers.{index}.mlp.down_proj" for index in (0, 2, 3)]
    with pytest.raises(ValueError, match="0 to 3"):
        get_peft_model(build_model("llama"), EditConfig(layers_to_transform=[NUM_LAYERS]))


def test_gpt2_attention_is_left_alone():
    model = get_peft_model(build_model("gpt2"), random_config())
    assert list(model.base_model.edit_layers()) == [f"transformer.h.{index}.mlp.c_proj" for index in range(NUM_LAYERS)]


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_a_model_without_head(family):
    base = build_model(family).base_model
    before = base(TOKENS).last_hidden_state
    model = get_peft_model(base, EditConfig(init_weights=False))
    assert model.base_model.edit_layers()
    assert not torch.allclose(model(TOKENS).last_hidden_state, before)


def test_a_model_of_unknown_type_is_read_by_its_structure():
    base = build_model("llama")
    base.config.model_type = "unheard_of"
    assert list(get_peft_model(base, EditConfig()).base_model.edit_layers()) == ["model.layers.0.mlp.down_proj"]


class Custom(nn.Module):
    """No transformers model; one module's name contains the parameter prefix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(4, 4)}) for _ in range(3)])
        self.credit_head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer["lin"](x).tanh()
        return self.credit_head(x)


def test_a_custom_module():
    base, x = Custom(), torch.randn(2, 4)
    before = base(x)
    model = get_peft_model(base, EditConfig(target_modules=["lin", "credit_head"], init_weights=False))
    assert set(model.base_model.edit_layers()) == {"layers.0.lin", "layers.1.lin", "layers.2.lin", "credit_head"}
    assert not torch.allclose(model(x), before)
    some = EditConfig(target_modules=["lin"], layers_to_transform=[1], layers_pattern="layers")
    assert list(get_peft_model(Custom(), some).base_model.edit_layers()) == ["layers.1.lin"]
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(Custom(), EditConfig())
    with pytest.raises(ValueError, match="Embedding"):
        get_peft_model(build_model("llama"), EditConfig(target_modules=["embed_tokens"]))


def test_two_models_never_share_a_config():
    shared = EditConfig(task_type="CAUSAL_LM", modules_to_save=None)
    first, second = (get_peft_model(build_model(family), shared) for family in ("llama", "gpt2"))
    # As everywhere in PEFT the first user of a config works on the object itself; any other gets a copy.
    assert first.peft_config["default"] is shared
    first.peft_config["default"].memory = "of the first"
    first.peft_config["default"].norm_budget = 0.1
    assert second.peft_config["default"].memory is None
    assert second.peft_config["default"].norm_budget is None
    assert second.peft_config["default"].target_modules == {"mlp.c_proj"}
    first.add_adapter("other", shared)
    assert first.peft_config["other"].memory is None
    injected = inject_adapter_in_model(shared, build_model("opt"))
    assert any("edit_delta" in name for name, _ in injected.named_parameters())


# --- save and load -----------------------------------------------------------------------------------------------


@some
@dtypes
def test_saved_and_loaded_the_logits_are_the_same(family, dtype, tmp_path):
    model = random_adapter(family, dtype)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == NUM_LAYERS and all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert all(key.startswith("base_model.model.") and key.endswith(".edit_delta.weight") for key in stored)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            build_model(family, dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(logits(loaded), expected)
        assert same_deltas(deltas(loaded), deltas(model))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=str)
def saved(request, tmp_path):
    """A tiny Llama and an adapter for it on disk: their directories and the adapter model."""
    base = build_model("llama", request.param)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=request.param)
    model = get_peft_model(base, random_config()).eval()
    model.save_pretrained(tmp_path / "edits")
    return tmp_path / "base", tmp_path / "edits", model, request.param


def test_auto_classes_load_the_adapter_directory(saved):
    _, edits, model, dtype = saved
    expected = logits(model)
    for automatic in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(logits(automatic.from_pretrained(edits, dtype=dtype)), expected)


def test_transformers_own_adapter_methods(saved):
    base, edits, model, dtype = saved
    expected = logits(model)
    native = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    before = logits(native)
    native.load_adapter(str(edits))
    assert torch.equal(logits(native), expected)
    native.disable_adapters()
    assert torch.equal(logits(native), before)
    native.enable_adapters()
    native.add_adapter(random_config(), "second")
    native.set_adapter("second")
    assert not torch.equal(logits(native), expected)
    native.delete_adapter("second")
    native.set_adapter("default")
    assert torch.equal(logits(native), expected)
    assert native.get_adapter_state_dict().keys() == {
        key.removeprefix("base_model.model.") for key in load_file(edits / "adapter_model.safetensors")
    }


def test_every_adapter_has_a_directory_of_its_own(tmp_path):
    model = random_adapter("llama")
    model.add_adapter("default2", random_config(layers_to_transform=[1]))
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == NUM_LAYERS
    assert len(load_file(tmp_path / "default2" / "adapter_model.safetensors")) == 1
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "default2", "default2")
    for name in ("default", "default2"):
        assert same_deltas(deltas(loaded, name), deltas(model, name))
        loaded.set_adapter(name)
        model.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


def test_config_on_disk_is_enough_to_build_the_adapter_again(tmp_path):
    model = get_peft_model(build_model("llama"), EditConfig(task_type="CAUSAL_LM", norm_budget=0.1))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["layers_to_transform"] == [0] and written["target_modules"] == ["mlp.down_proj"]
    assert written["inference_mode"] is True and written["norm_budget"] == 0.1


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    random_adapter("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="shape"):
        PeftModel.from_pretrained(build_model("llama", intermediate_size=32), tmp_path)


def test_state_dict_round_trip():
    model = random_adapter("llama")
    state = get_peft_model_state_dict(model)
    other = get_peft_model(build_model("llama"), random_config(init_weights=True))
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert same_deltas(deltas(other), deltas(model))


# --- adapters ----------------------------------------------------------------------------------------------------


@some
def test_adapters_are_switched_combined_disabled_and_deleted(family):
    base = logits(build_model(family))
    model = random_adapter(family)
    model.add_adapter("second", random_config())
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert len({float(value.sum()) for value in (base, first, second)}) == 3
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, first) and not torch.allclose(both, second)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), both)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert "second" not in model.peft_config and not model.base_model.edit_layers("second")
    with pytest.warns(UserWarning, match="active"):
        model.add_adapter("third", random_config())
        model.delete_adapter("default")
    assert model.active_adapters == ["third"]
    model.delete_adapter("third")
    assert torch.equal(logits(model.base_model), base)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("third")


def test_deleting_reaches_modules_whose_name_contains_the_prefix():
    config = EditConfig(target_modules=["credit_head"], init_weights=False)
    model = get_peft_model(Custom(), config)
    model.add_adapter("second", config)
    model.delete_adapter("second")
    assert list(model.base_model.edit_layers()["credit_head"].edit_delta) == ["default"]


def test_a_merged_adapter_cannot_be_deleted():
    model = random_adapter("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    assert deltas(model)
    model.unmerge_adapter()
    model.delete_adapter("default")


def test_deleting_an_adapter_that_other_modules_do_not_have():
    model = get_peft_model(build_model("llama"), random_config(layers_to_transform=[3]), adapter_name="late")
    model.add_adapter("early", random_config(layers_to_transform=[0, 1]))
    model.set_adapter("early")
    expected = logits(model)
    model.set_adapter("late")
    with pytest.warns(UserWarning, match="active"):
        model.delete_adapter("late")
    assert model.active_adapters == ["early"]
    assert torch.equal(logits(model), expected)


def test_weighted_adapters():
    model = random_adapter("gpt2")
    model.add_adapter("second", random_config())
    model.peft_config["default"].memory = "facts"
    model.base_model.add_weighted_adapter(["default", "second"], [0.25, -2.0], "mixed")
    for name, delta in deltas(model, "mixed").items():
        torch.testing.assert_close(delta, 0.25 * deltas(model)[name] - 2.0 * deltas(model, "second")[name])
    assert model.peft_config["mixed"].memory is None and model.peft_config["default"].memory == "facts"
    assert model.active_adapters == ["default"]
    before = logits(model)
    model.set_adapter("mixed")
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["default", "absent"], [1.0, 1.0], "new"), "absent"),
        ((["default"], [1.0, 1.0], "new"), "weight"),
        (([], [], "new"), "weight"),
        ((["default"], [1.0], "default"), "already"),
        ((["default"], [1.0], "new", "svd"), "svd"),
        ((["default", "elsewhere"], [1.0, 1.0], "new"), "different modules"),
        ((["default"], [1.0], "new", "memory"), "memory"),
    ],
)
def test_weighted_adapters_that_cannot_be(arguments, message):
    model = random_adapter("llama")
    model.add_adapter("elsewhere", random_config(layers_to_transform=[0]))
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default", "elsewhere"}


@some
def test_each_sample_with_its_own_adapter(family):
    model = random_adapter(family)
    model.add_adapter("second", random_config())
    with model.disable_adapter():
        base = logits(model)
    second = logits(model, adapter_names=["second", "second"])
    mixed = logits(model, adapter_names=["__base__", "second"])
    torch.testing.assert_close(mixed[0], base[0])
    torch.testing.assert_close(mixed[1], second[1])
    assert not torch.allclose(mixed[1], logits(model)[1])
    with pytest.raises(ValueError, match="absent"):
        model(TOKENS, adapter_names=["absent", "default"])
    with pytest.raises(ValueError, match="adapter_names"):
        model(TOKENS, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="training"):
        model.train()(TOKENS, adapter_names=["default", "second"])


def test_each_sample_with_its_own_adapter_in_generation():
    model = random_adapter("llama")
    model.add_adapter("second", random_config())
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 2}
    mixed = model.generate(input_ids=TOKENS, adapter_names=["__base__", "second"], **options)
    with model.disable_adapter():
        base = model.generate(input_ids=TOKENS, **options)
    model.set_adapter("second")
    second = model.generate(input_ids=TOKENS, **options)
    assert torch.equal(mixed[0], base[0]) and torch.equal(mixed[1], second[1])
    assert not torch.equal(base[1], second[1])


def test_modules_to_save_are_mixed_too():
    model = random_adapter("llama", modules_to_save=["lm_head"])
    model.add_adapter("second", random_config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["second"].weight.mul_(2.0)
    with model.disable_adapter():
        base = logits(model)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, adapter_names=["__base__", "second"]), torch.stack([base[0], second[1]]))
    torch.testing.assert_close(logits(model, adapter_names=["second", "default"]), torch.stack([second[0], first[1]]))
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 2}
    mixed = model.generate(input_ids=TOKENS, adapter_names=["default", "second"], **options)
    model.set_adapter("second")
    assert torch.equal(mixed[1], model.generate(input_ids=TOKENS, **options)[1])


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


# --- copies, training, compilation -------------------------------------------------------------------------------


def test_deepcopy_is_independent():
    model = random_adapter("llama")
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    for layer in twin.base_model.edit_layers().values():
        layer.set_delta("default", torch.zeros_like(layer.get_delta("default")))
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)
    twin.peft_config["default"].norm_budget = 0.5
    assert model.peft_config["default"].norm_budget is None


def test_a_merged_model_survives_a_deepcopy():
    model = random_adapter("llama")
    expected = logits(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(logits(twin), expected)


def test_pickle():
    model = random_adapter("gpt2")
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@some
@pytest.mark.parametrize("checkpointing", (False, True))
def test_the_delta_trains_for_those_who_ask(family, checkpointing):
    model = random_adapter(family, trainable=True).train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == NUM_LAYERS and all(".edit_delta.default.weight" in name for name in trainable)
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    before = {name: delta.clone() for name, delta in deltas(model).items()}
    losses = []
    for _ in range(3):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(delta, before[name]) for name, delta in deltas(model).items())


def test_an_edit_stays_frozen_through_everything_that_thaws_adapters(tmp_path):
    model = get_peft_model(build_model("llama"), EditConfig(task_type="CAUSAL_LM"))
    model.add_adapter("second", EditConfig(task_type="CAUSAL_LM"))
    model.set_adapter("second")
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    model.base_model.set_adapter(["default", "second"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_model("llama"), tmp_path, is_trainable=True)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_compiled_gives_the_same_logits():
    model = random_adapter("llama")
    expected = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    torch.testing.assert_close(logits(compiled), expected)


@dtypes
def test_half_precision_output_is_close_to_float32(dtype):
    expected = logits(random_adapter("llama"))
    actual = logits(random_adapter("llama", dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=5e-2, rtol=5e-2)


# --- beside other adapter types ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_targets", (["q_proj"], ["q_proj", "down_proj"]))
@pytest.mark.parametrize("edit_first", (True, False))
def test_beside_lora(lora_targets, edit_first, tmp_path):
    """Both types on one model, also around the same module: each acts, each is saved, merged and taken out alone."""
    model = build_model("llama")
    base = logits(model)
    configs = {"edits": random_config(), "lora": LoraConfig(target_modules=lora_targets, init_lora_weights=False)}
    for name in configs if edit_first else reversed(configs):
        model.add_adapter(configs[name], name)
    model.set_adapter("edits")
    edited = logits(model)
    model.set_adapter(["edits", "lora"])
    both = logits(model)
    assert not torch.allclose(both, edited) and not torch.allclose(edited, base)
    state = model.get_adapter_state_dict("edits")
    assert len(state) == NUM_LAYERS and all(".edit_delta." in key for key in state)

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight.clone() for layer in layers]
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)
    for layer in layers:
        layer.unmerge()
    for layer, weight in zip(layers, weights):
        torch.testing.assert_close(layer.get_base_layer().weight, weight, atol=1e-6, rtol=0)


def test_the_checkpoint_holds_no_lora_of_the_same_name(tmp_path):
    base = build_model("llama")
    base.add_adapter(LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False), "default")
    model = get_peft_model(base, random_config())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == NUM_LAYERS and all(key.endswith(".down_proj.edit_delta.weight") for key in stored)
    alone = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert same_deltas(deltas(alone), deltas(model))


def test_converts_to_lora():
    model = random_adapter("llama")
    config, state = convert_to_lora(model, rank=32)
    converted = get_peft_model(build_model("llama"), config).eval()
    set_peft_model_state_dict(converted, state)
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-4, rtol=1e-4)
