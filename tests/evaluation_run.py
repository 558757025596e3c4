"""What each process of a distributed scoring test does: `python -m tests.evaluation_run OUTPUT`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate import PartialState

from peft_edit.evaluation.retention import retention
from peft_edit.evaluation.scores import recall, score_edits
from peft_edit.evaluation.token_scores import score_tokens
from peft_edit.tiny import load_tiny_facts, load_tiny_model


def noisy_tiny_model(strength: float = 2.0, seed: int = 0):
    """The tiny model with noise on its down-projections: right about some facts, wrong about others."""
    model, tokenizer = load_tiny_model()
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            noise = torch.randn(module.weight.shape, generator=generator)
            module.weight.data += strength * module.weight.std() * noise
    return model, tokenizer


def sentences(facts):
    return " ".join(f"{fact.filled_prompt} {fact.target_true}." for fact in facts)


def run_scores():
    model, tokenizer = noisy_tiny_model()
    base, _ = load_tiny_model()
    facts, others = load_tiny_facts()[:5], load_tiny_facts()[100:103]
    pairs = [(fact.filled_prompt, fact.target_true) for fact in others]
    settings = {"resamples": 50}
    kept = retention(model, tokenizer, facts, pairs, sentences(others), base, window=12, stride=5, **settings)
    return {
        "edits": score_edits(model, tokenizer, facts, **settings).to_dict(per_fact=True),
        "tokens": score_tokens(model, tokenizer, facts, base=base, **settings).to_dict(per_fact=True),
        "recall": recall(model, tokenizer, pairs),
        "one": recall(model, tokenizer, pairs[:1]),  # a process is left without any
        "retention": kept.to_dict(per_fact=True),
    }


def run_different_facts():
    model, tokenizer = load_tiny_model()
    try:
        score_edits(model, tokenizer, load_tiny_facts()[int(os.environ["RANK"]) :][:3])
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    [output] = sys.argv[1:]
    state = PartialState(cpu=True)
    found = {"scores": run_scores(), "refusal": run_different_facts()}
    torch.save(found, Path(output) / f"{os.environ['RANK']}.pt")
    state.wait_for_everyone()  # a process that leaves first may take the others' connections with it
    state.destroy_process_group()
