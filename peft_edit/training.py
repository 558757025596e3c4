"""Steps of fine-tuning on prompts and targets: gradients in chunks, Adam in float32, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .hooks import on_input
from .scoring import TokenPairs


def accumulate_gradients(model: Any, pairs: TokenPairs, chunk: int, backward: bool = True) -> tuple[float, bool]:
    """Adds to the weights' gradients that of the loss, the mean over P pairs of the mean NLL of a target's tokens.

    Args:
        model: The causal language model.
        pairs: (prompt token ids, target token ids).
        chunk (`int`): Pairs per pass.
        backward (`bool`): Else the loss alone is worked out.

    Returns:
        The loss, in nats per token, and whether every target token is the most probable one.
    """
    device = model.get_input_embeddings().weight.device
    total, greedy = 0.0, True
    with torch.set_grad_enabled(backward):
        for start in range(0, len(pairs), chunk):
            logits, labels, share = _target_logits(model, pairs[start : start + chunk], device)
            losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
            loss = (losses * share).sum() / len(pairs)
            if backward:
                loss.backward()
            total += float(loss.detach())
            greedy = greedy and bool((logits.argmax(-1) == labels).all())
    return total, greedy


def _target_logits(
    model: Any, pairs: TokenPairs, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For all T target tokens of the pairs (T, vocabulary) logits, (T,) the token, (T,) 1 / length of its target."""
    sequences = [[*prompt, *target][:-1] for prompt, target in pairs]
    width = max(map(len, sequences))
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=device)
    places = [(row, len(prompt) - 1 + i) for row, (prompt, target) in enumerate(pairs) for i in range(len(target))]
    rows, columns = torch.tensor(places).T

    def gather(hidden: torch.Tensor) -> torch.Tensor:
        return hidden[rows.to(hidden.device), columns.to(hidden.device)][None]

    with on_input(model.get_output_embeddings(), gather):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    labels = torch.tensor([token for _, target in pairs for token in target], device=logits.device)
    share = torch.tensor([1 / len(target) for _, target in pairs for _ in target], device=logits.device)
    return logits, labels, share


class MasterAdam:
    """Adam on float32 copies of weights, which keep the small steps that a 16-bit weight would round away."""

    def __init__(self, weights: Sequence[nn.Parameter], lr: float) -> None:
        self.weights = weights
        self.starts = [weight.detach().float().clone() for weight in weights]
        self.masters = [nn.Parameter(start.clone()) for start in self.starts]
        self.adam = torch.optim.Adam(self.masters, lr=lr)

    def step(self) -> None:
        """A step of the masters along the weights' gradients, which are cleared."""
        for weight, master in zip(self.weights, self.masters):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self.adam.step()

    def write(self) -> None:
        """The masters, rounded, into the weights."""
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters):
                weight.copy_(master)


@contextmanager
def alone_trainable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these weights ask for gradients; afterwards every weight does as before, and these hold none."""
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    model.requires_grad_(False)
    try:
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        yield
    finally:
        for weight, required in before:
            weight.requires_grad_(required)
        for weight in weights:
            weight.grad = None


@contextmanager
def restored_on_error(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Whatever goes wrong inside, the weights are as before."""
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for weight, old in zip(weights, before):
                weight.copy_(old)
        raise
