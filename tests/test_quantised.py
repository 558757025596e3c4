"""Editing a quantised base: the delta stays in float32 on top of it. Each backend where it is installed."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit import EditConfig
from peft_edit.fingerprint import check_fingerprint, model_fingerprint
from peft_edit.tiny import load_tiny_facts, load_tiny_model, tiny_model_path


def quantised_on_loading(config):
    path = tiny_model_path()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    return model.eval(), AutoTokenizer.from_pretrained(path)


def with_quantised_down_projections(quantise):
    """The tiny model with the modules replaced; its other widths do not suit every kernel."""
    model, tokenizer = load_tiny_model()
    for block in model.model.layers:
        block.mlp.down_proj = quantise(block.mlp.down_proj)
    model.is_quantized = True
    return model, tokenizer


def torchao_8bit():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return quantised_on_loading(TorchAoConfig(Int8WeightOnlyConfig()))


def hqq_8bit():
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=8, group_size=64)
    return with_quantised_down_projections(
        lambda linear: quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    )


def bitsandbytes_8bit():
    bnb = pytest.importorskip("bitsandbytes")

    def quantise(linear: nn.Linear) -> nn.Module:
        quantised = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        quantised.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return quantised.to("cpu")

    return with_quantised_down_projections(quantise)


def bitsandbytes_4bit(compress_statistics: bool):
    bnb = pytest.importorskip("bitsandbytes")

    def quantise(linear: nn.Linear) -> nn.Module:
        options = {"quant_type": "nf4", "compress_statistics": compress_statistics}
        quantised = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, **options
        )
        quantised.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options)
        return quantised.to("cpu")

    return with_quantised_down_projections(quantise)


# How far the base's norm, the statistics and the merged logits may be off: coarser steps, more.
BACKENDS = {
    "torchao 8 bit": SimpleNamespace(load=torchao_8bit, norm=1e-3, merged=0.1),
    "hqq 8 bit": SimpleNamespace(load=hqq_8bit, norm=1e-3, merged=0.1),
    "bitsandbytes 8 bit": SimpleNamespace(load=bitsandbytes_8bit, norm=1e-3, merged=0.2),
    "bitsandbytes 4 bit": SimpleNamespace(load=lambda: bitsandbytes_4bit(False), norm=1e-2, merged=0.5),
    "bitsandbytes 4 bit, nested": SimpleNamespace(load=lambda: bitsandbytes_4bit(True), norm=1e-2, merged=0.5),
}


@pytest.fixture(scope="module", params=list(BACKENDS))
def edited(request):
    """An edited model on a quantised base, the report, and what is allowed."""
    backend = BACKENDS[request.param]
    base, tokenizer = backend.load()
    facts = load_tiny_facts()
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM")).eval()
    model.collect_statistics([f"{fact.filled_prompt} {fact.target_true}." for fact in facts[:200]], tokenizer)
    report = model.edit_facts(facts[:10], tokenizer, progress=False)
    ids = tokenizer(facts[0].filled_prompt, return_tensors="pt").input_ids
    return SimpleNamespace(model=model, report=report, ids=ids, allowed=backend)


def logits(edited) -> torch.Tensor:
    with torch.no_grad():
        return edited.model(input_ids=edited.ids).logits.clone()


def test_facts_are_written_into_a_float32_delta(edited):
    assert sum(fact.recalled for fact in edited.report.facts) >= 8
    for layer in edited.model.base_model.edit_layers().values():
        assert layer.quantization_backend is not None
        assert layer.get_delta("default").dtype == torch.float32 and layer.get_delta("default").any()


def test_base_norm_is_that_of_the_dequantised_weight(edited):
    """Also after forward passes, for which bitsandbytes rearranges 4-bit weights on some CPUs."""
    logits(edited)
    original = load_tiny_model()[0]
    for name, layer in edited.model.base_model.edit_layers().items():
        weight = original.get_submodule(name).weight.detach()
        assert layer.base_norm() == pytest.approx(float(weight.norm()), rel=edited.allowed.norm)
        apart = layer.get_base_weight().float() - weight
        assert float(apart.norm() / weight.norm()) < 0.12


def test_the_fingerprint_is_the_same_with_and_without_an_adapter():
    for backend in (torchao_8bit, hqq_8bit, bitsandbytes_8bit, lambda: bitsandbytes_4bit(False)):
        try:
            base, _ = backend()
        except pytest.skip.Exception:
            continue
        names = ["model.layers.0.mlp.down_proj"]
        plain = model_fingerprint(base, names)
        model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM"))
        wrapped = model_fingerprint(model.base_model.model, names)
        check_fingerprint(plain, wrapped, "Edits")
        check_fingerprint(model_fingerprint(load_tiny_model()[0], names), plain, "Edits", quantised=True)


def test_merge_changes_little_and_unmerge_nothing(edited):
    model, layers = edited.model, edited.model.base_model.edit_layers()
    before = logits(edited)
    norms = {name: layer.base_norm() for name, layer in layers.items()}
    with model.disable_adapter():
        base = logits(edited)
    model.merge_adapter()
    assert (logits(edited) - before).norm() < edited.allowed.merged * (before - base).norm()
    assert {name: layer.base_norm() for name, layer in layers.items()} == norms
    model.unmerge_adapter()
    assert torch.equal(logits(edited), before)
    assert {name: layer.base_norm() for name, layer in layers.items()} == norms
