"""Every supported architecture: facts take, both ways of searching agree, saving, loading and merging hold."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_edit import EditConfig
from peft_edit.editing import FactEditor
from peft_edit.residual import ResidualPath

from .models import FAMILIES, build_model
from .world import NAMES, texts, town_facts, word_tokenizer


BEHIND_A_NORM = ("gemma2", "gemma3", "olmo2")

# Random models: a gentle search with room, and an update that writes all of it.
# More than one extra step, for the margin that a random model needs.
SETTINGS = dict(
    search_lr=0.1,
    search_max_norm=6.0,
    search_weight_decay=0.0,
    search_steps=60,
    num_contexts=1,
    mpes_extra_steps=3,
)
UPDATE = dict(preservation_weight=1e-3, refinements=2)


def base(family):
    """A random model; where a norm stands behind the MLP, those to be edited get a voice."""
    model = build_model(family, seed=1)
    if family in BEHIND_A_NORM:
        for layer in model.model.layers[:2]:
            torch.nn.init.constant_(layer.post_feedforward_layernorm.weight, 8.0)
    if family == "olmo2":  # nothing before its MLP brings hidden states to a common size
        model.model.embed_tokens.weight.data *= 50
    return model


def wrapped(family, **settings):
    model = base(family)
    rate = {"search_lr": 3.0} if family in BEHIND_A_NORM else {}  # their hidden states are large
    settings = {**SETTINGS, **UPDATE, **rate, **settings}
    return get_peft_model(model, EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1], **settings)).eval()


def next_words(model, tokenizer, names):
    with torch.no_grad():
        return [
            int(model(**tokenizer(f"The town of {name}", return_tensors="pt")).logits[0, -1].argmax())
            for name in names
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_take_and_the_adapter_travels(family, tmp_path):
    tokenizer, facts = word_tokenizer(), town_facts(4)
    model = wrapped(family)
    model.collect_statistics(texts(), tokenizer, max_tokens=640)
    before = next_words(model, tokenizer, NAMES)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be split.*")
        report = model.edit_facts(facts, tokenizer, batch_size=2, progress=False)
    assert report.recalled >= 3, str(report)
    # Random models know nothing, so nothing can be kept here; the tiny model's tests are about that.

    answers = next_words(model, tokenizer, NAMES)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(family), tmp_path).eval()
    assert next_words(loaded, tokenizer, NAMES) == answers
    loaded.remove_facts(loaded.edited_facts())
    assert next_words(loaded, tokenizer, NAMES) == before
    assert next_words(model.merge_and_unload(), tokenizer, NAMES) == answers


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_of_searching_agree(family):
    tokenizer, facts = word_tokenizer(), town_facts(3)
    deltas = []
    for full in (False, True):
        model = wrapped(family, search_steps=6).double()
        model.collect_statistics(texts(), tokenizer)
        model.edit_facts(facts, tokenizer, full_search=full, progress=False)
        deltas.append([layer.get_delta("default") for layer in model.edit_layers().values()])
    for split, whole in zip(*deltas):
        assert float((split - whole).norm() / whole.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_to_the_residual_stream_is_found(family):
    tokenizer = word_tokenizer()
    model = wrapped(family)
    model.collect_statistics(texts(), tokenizer)
    editor = FactEditor(model.base_model, "default", tokenizer, progress=False)
    prompts = editor.encoder.encode_fact(town_facts(1)[0], [])
    for name in editor.layers:
        path = editor._path(name, prompts)
        assert isinstance(path, ResidualPath)
        assert (path.norm is not None) == (family in BEHIND_A_NORM)
        generator = torch.Generator().manual_seed(0)
        output = torch.randn(3, 32, generator=generator)
        reachable = path.push(output, 0.5 * torch.randn(3, 32, generator=generator))
        with torch.no_grad():
            assert torch.allclose(path.push(output, path.pull(output, reachable)), reachable, atol=2e-3)
