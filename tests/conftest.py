"""The bundled tiny model and its facts."""

import os

import pytest
import torch

from peft_edit import KeyStatistics
from peft_edit.tiny import load_tiny_facts, load_tiny_model


if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker: more would only wait for each other
    torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """A fresh tiny model and its tokenizer."""
    return load_tiny_model()


@pytest.fixture(scope="session")
def facts():
    """Facts that the tiny model knows."""
    return load_tiny_facts()


@pytest.fixture(scope="session")
def tiny_statistics() -> KeyStatistics:
    """Key statistics of every down-projection of the tiny model, from its own true sentences."""
    from peft_edit import collect_statistics

    model, tokenizer = load_tiny_model()
    modules = [name for name, _ in model.named_modules() if name.endswith("down_proj")]
    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in load_tiny_facts()]
    return collect_statistics(model, tokenizer, texts, modules, source="true sentences")
