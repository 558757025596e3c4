"""Random models in which it is known where an answer comes from, and facts to ask them for."""

from __future__ import annotations

import torch
from torch import nn

from peft_edit import Fact
from peft_edit.prompts import PromptEncoder

from .models import build_model
from .world import word_tokenizer


TOKENIZER = word_tokenizer()
LAYERS = 4


def encoder_of(model):
    return PromptEncoder(TOKENIZER, model.get_input_embeddings().num_embeddings)


def one_word_facts() -> list[Fact]:
    """Subjects of one token, so that nothing of them is anywhere but at their last token."""
    return [Fact(name, "The town of {} is a", "Rome") for name in ("Ada", "Ben", "Cleo", "Dan", "Eve")]


def two_word_facts() -> list[Fact]:
    """Prompts of different length, some that begin or end with their subject."""
    prompts = ("The town of {} is a", "{} is a", "The town of {}", "Because I is a town of {} . You is")
    return [
        Fact(f"{first} Stone Vale", prompt, city)
        for first, prompt, city in zip(("Ada", "Ben", "Cleo", "Dan"), prompts, ("Rome", "Oslo", "Lima", "Cairo"))
    ]


def planted(mlp: int, attention: int) -> nn.Module:
    """A random Llama in which one block's MLP and one block's attention alone write to the residual stream."""
    model = build_model("llama")
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            # Larger than at the start of training, so that what is written counts beside the embeddings.
            block.mlp.down_proj.weight.mul_(60.0 if layer == mlp else 0.0)
            block.self_attn.o_proj.weight.mul_(60.0 if layer == attention else 0.0)
        model.model.norm.weight.mul_(30.0)  # probabilities far from uniform
    return model
