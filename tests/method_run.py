"""Methods on the bundled tiny model: fixtures that make an adapter or prompts, and what their tests read off.

Test modules name this one in `pytest_plugins` for its fixtures. They import its functions too, before pytest could
rewrite its asserts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig
from peft_edit.prompts import PromptEncoder, generate_contexts
from peft_edit.search.in_context import encode_in_context
from peft_edit.tiny import load_tiny_model


TWO_LAYERS = {"target_modules": ["mlp.down_proj"], "layers_to_transform": [0, 1]}


@pytest.fixture
def problem(tiny, facts):
    """The tiny model, and six facts encoded with and without the fact in context."""
    model, tokenizer = tiny
    contexts = generate_contexts(model, tokenizer, 2, seed=0)
    encoder = PromptEncoder(tokenizer, model.config.vocab_size, 256)
    return model, [encode_in_context(encoder, fact, contexts) for fact in facts[:6]]


@pytest.fixture
def wrap(tiny_statistics):
    """A function that wraps a fresh tiny model with an edit adapter of some method."""

    def make(method="encore", **settings):
        base, tokenizer = load_tiny_model()
        quick = {} if method == "ultraedit" else {"search_steps": 4}
        config = EditConfig.from_method(method, task_type="CAUSAL_LM", **{"num_contexts": 1, **quick, **settings})
        model = get_peft_model(base, config).eval()
        model.set_statistics(tiny_statistics)
        return model, tokenizer

    return make


def edit(model, facts, tokenizer, **options):
    return model.edit_facts(facts, tokenizer, progress=False, **options)


def deltas(model):
    return {name: layer.get_delta("default").clone() for name, layer in model.edit_layers("default").items()}


def memory_of(model):
    return model.peft_config["default"].memory


def same(one, other, tolerance=0.0):
    """Whether deltas are equal, or apart by at most a share of their norm."""
    return all(float((one[name] - each).norm()) <= tolerance * float(each.norm()) for name, each in other.items())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
