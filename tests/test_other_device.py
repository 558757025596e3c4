"""A model on another device than the CPU: every tensor is where the model is.

torch's lazy backend stands in for a GPU. It computes on the CPU, and like a GPU it refuses to mix its tensors with the
CPU's.
"""

import contextlib
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig
from peft_edit.evaluation import score_edits

from .models import build_model
from .world import texts, town_facts, word_tokenizer


@pytest.fixture(scope="module")
def device():
    """The lazy device; torch knows no autocast for it, so there it is off."""
    backend = pytest.importorskip("torch._lazy.ts_backend")
    try:
        backend.init()
        torch.zeros(1, device="lazy")
    except RuntimeError as error:
        pytest.skip(f"no lazy backend: {error}")
    with pytest.raises(RuntimeError, match="not a lazy tensor"):
        torch.zeros(1, device="lazy") + torch.ones(1)
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "autocast", lambda kind, **kw: contextlib.nullcontext() if kind == "lazy" else autocast(kind, **kw)
        )
        patch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("lazy",) and enabled(*kind))
        yield torch.device("lazy")


@pytest.mark.parametrize("family, settings", [("llama", {}), ("gemma2", {}), ("llama", {"update": "null_space"})])
def test_editing_gives_what_it_gives_on_the_cpu(device, family, settings):
    found = []
    for place in (torch.device("cpu"), device):
        config = EditConfig(
            task_type="CAUSAL_LM", layers_to_transform=[0, 1], num_contexts=1, search_steps=3, **settings
        )
        model = get_peft_model(build_model(family).to(place), config).eval()
        tokenizer, facts = word_tokenizer(), [replace(fact, target_true="town") for fact in town_facts(4)]
        model.collect_statistics(texts(), tokenizer)
        model.edit_facts(facts[:3], tokenizer, progress=False)
        model.edit_facts(facts[3:], tokenizer, progress=False)
        model.remove_facts(facts[:1])
        model.set_norm_budget(0.5)
        scores = score_edits(model, tokenizer, facts)
        deltas = [layer.get_delta("default") for layer in model.edit_layers().values()]
        assert all(delta.device.type == place.type for delta in deltas)
        found.append(([delta.cpu() for delta in deltas], scores.score))
    (here, score), (there, other_score) = found
    for one, other in zip(here, there):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)
    assert other_score == pytest.approx(score, nan_ok=True)
