"""What a model answers, and what it answered before it was edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..facts import Fact


LONGEST_ANSWER = 8  # tokens


def complete(model: Any, tokenizer: Any, prompt: str, tokens: int = LONGEST_ANSWER, avoid: Sequence[int] = ()) -> str:
    """The greedy continuation of a prompt, up to the end of its sentence.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt (`str`): The text to go on with.
        tokens (`int`): Tokens at most.
        avoid (`Sequence[int]`): Tokens that the continuation may not begin with.
    """
    device = model.get_input_embeddings().weight.device
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    settings = {"begin_suppress_tokens": list(avoid)} if avoid else {}
    with torch.no_grad():
        written = model.generate(
            **encoded,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **settings,
        )
    text = tokenizer.decode(written[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip().split("\n")[0].split(". ")[0].rstrip(".").strip()


def with_true_targets(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> tuple[list[Fact], int]:
    """Gives facts without `target_true` the unedited model's own answer, of about the target's length.

    Where that answer is the target itself, it is the best one that begins otherwise: a comparison needs two answers.

    Args:
        model: The PEFT model; its adapters are off for this.
        tokenizer: Its tokenizer.
        facts (`Sequence[Fact]`): Facts.

    Returns:
        `list[Fact]`, all with `target_true`; and how many were given one.
    """
    missing = [fact for fact in facts if not (fact.target_true or "").strip()]
    if not missing:
        return list(facts), 0
    with model.disable_adapter():
        return [fact if fact not in missing else _with_answer(model, tokenizer, fact) for fact in facts], len(missing)


def _with_answer(model: Any, tokenizer: Any, fact: Fact) -> Fact:
    target = fact.target.strip()
    ids = tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
    answer = complete(model, tokenizer, fact.filled_prompt, tokens=len(ids))
    if answer == target or not answer:
        answer = complete(model, tokenizer, fact.filled_prompt, tokens=len(ids), avoid=ids[:1])
    return replace(fact, target_true=answer or "?")
