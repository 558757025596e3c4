"""Several adapters on one model, as PEFT has them: switched, combined, mixed, deleted; beside LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from peft_edit import EditConfig

from .models import NUM_LAYERS, build_model
from .random_adapters import TOKENS, Custom, deltas, logits, random_adapter, random_config, same_deltas, some


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
