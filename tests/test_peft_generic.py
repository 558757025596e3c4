"""What PEFT asks of every adapter type: injected, saved and loaded, copied, trained, compiled; nothing of facts."""

import copy
import json
import pickle

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_edit import EditConfig, EditLinear

from .models import FAMILIES, NUM_LAYERS, build_model
from .random_adapters import TOKENS, Custom, deltas, dtypes, logits, random_adapter, random_config, same_deltas, some


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
