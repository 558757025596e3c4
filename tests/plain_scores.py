"""Models to score, and plain loops of one forward pass at a time to compare the scores with.

Test modules of scores name this one in `pytest_plugins` for its fixture. They import its functions too, before pytest
could rewrite its asserts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig

from .evaluation_run import noisy_tiny_model


NAN = float("nan")
KINDS = ("efficacy", "paraphrase", "neighborhood")


@pytest.fixture(scope="session")
def noisy():
    """A model that knows some facts only, and its tokenizer; no test changes it."""
    return noisy_tiny_model()


def edited_tiny(tiny, strength=4.0):
    """An edit adapter with random deltas, of which nothing was searched."""
    base, tokenizer = tiny
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(1)
    for layer in model.edit_layers().values():
        weight = layer.get_base_weight()
        layer.set_delta("default", strength * weight.std() * torch.randn(weight.shape, generator=generator))
    return model, tokenizer


def plain_log_probability(model, ids, start):
    """Log-probabilities of ids[start:], one forward pass for each; and whether each is the most probable."""
    found, hits = [], []
    for place in range(start, len(ids)):
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double().log_softmax(-1)
        found.append(float(row[ids[place]]))
        hits.append(int(row.argmax()) == ids[place])
    return found, hits


def plain_pair(model, tokenizer, prompt, target):
    """The same of each token of a target behind its prompt."""
    ids = tokenizer(prompt)["input_ids"]
    return plain_log_probability(model, tokenizer(f"{prompt} {target}")["input_ids"], len(ids))
