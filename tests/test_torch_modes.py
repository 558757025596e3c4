"""Editing under torch's modes and settings, as a caller may have them: gradients off, another default dtype."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_edit import EditConfig, adapter
from peft_edit.devices import free_memory

from .models import build_model
from .world import texts, town_facts, word_tokenizer


CONFIG = dict(task_type="CAUSAL_LM", layers_to_transform=[0, 1], num_contexts=1, search_steps=3)


def wrapped(**changes):
    model = get_peft_model(build_model("llama"), EditConfig(**{**CONFIG, **changes})).eval()
    model.collect_statistics(texts(), word_tokenizer())
    return model


def edit(model, facts):
    return model.edit_facts(facts, word_tokenizer(), progress=False)


def delta(model):
    return torch.stack([layer.get_delta("default") for layer in model.edit_layers().values()])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_facts_are_edited_where_gradients_are_off(mode):
    plain, other = wrapped(), wrapped()
    edit(plain, town_facts(3))
    with mode():
        edit(other, town_facts(3))
        other.remove_facts(town_facts(1))
    plain.remove_facts(town_facts(1))
    assert torch.equal(delta(plain), delta(other))
    edit(other, town_facts(4)[3:])  # what was made in there can be used outside


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = wrapped()
    with pytest.raises(RuntimeError, match=r"made in torch.inference_mode\(\), so that no gradient can pass"):
        edit(model, town_facts(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(tmp_path, dtype):
    plain = wrapped()
    edit(plain, town_facts(3))
    base, other = build_model("llama"), get_peft_model(build_model("llama"), EditConfig(**CONFIG)).eval()
    torch.set_default_dtype(dtype)
    try:
        other.collect_statistics(texts(), word_tokenizer())
        edit(other, town_facts(3))
        other.save_pretrained(tmp_path)
        edit(PeftModel.from_pretrained(base, tmp_path), town_facts(4)[3:])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(delta(other), delta(plain), rtol=1e-4, atol=1e-6)


def test_a_module_that_does_not_write_to_the_residual_stream_is_named():
    model = wrapped(target_modules=["gate_proj"], layers_to_transform=[0])
    with pytest.raises(ValueError, match=r"outputs where the residual stream is \d+ wide: facts are written into"):
        edit(model, town_facts(1))


def test_torch_s_own_cache_counts_as_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 80)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    device, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert free_memory(device) == 60
    needed = 8 * 6 * 4 * (4 + 2)
    for free, where in ((needed - 1, (cpu, cpu)), (needed, (device, cpu)), (2 * needed, (device, device))):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free - 50, 0))
        assert adapter.solver_devices(device, 4, 2) == where
