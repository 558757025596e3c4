"""The editing procedure as the published research scripts arrange it, for comparison; written for this benchmark.

One fact at a time, all its sequences padded into one batch, whole sequences through the whole model forward and back,
logits at every position, torch's own Adam on one vector; keys and outputs read by full passes for every edited layer;
one dense solve per layer and batch. Contexts, objective, ball and stopping rule are those of peft-edit, so both do the
same mathematics.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from peft_edit.hooks import on_input, on_output
from peft_edit.prompts import FactPrompts
from peft_edit.search import SearchSettings


def padded(rows: list[tuple[int, ...]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)


def search_one(
    model: Any, block: Any, module: Any, prompts: FactPrompts, settings: SearchSettings
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Increment (d_model,), target (d_model,) and the number of updates for one fact."""
    device = model.get_input_embeddings().weight.device
    rows = [*prompts.rows, prompts.essence]
    ids, mask = padded([row.ids for row in rows], device)
    subject = torch.tensor([row.subject_index for row in rows], device=device)
    every = torch.arange(len(rows), device=device)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(prompts.rows):
        labels[index, row.prompt_length - 1 : len(row.ids) - 1] = torch.tensor(row.target_ids, device=device)
    seen: dict[str, torch.Tensor] = {}
    delta: torch.Tensor | None = None

    def add(hidden: torch.Tensor) -> torch.Tensor | None:
        if delta is None:
            return None
        hidden = hidden.clone()
        hidden[every, subject] = hidden[every, subject] + delta.to(hidden)
        return hidden

    def keep(hidden: torch.Tensor) -> None:
        seen["hidden"] = hidden

    with on_output(module, add), on_output(block, keep):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            before = logits[-1, len(prompts.essence.ids) - 1].float().log_softmax(-1)
            hidden = seen["hidden"][0, subject[0]].float()
        delta = torch.zeros_like(hidden, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=settings.lr)
        reached = None
        is_target = labels >= 0
        for step in range(settings.steps):
            adam.zero_grad()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            scores = logits.log_softmax(-1)
            chosen = scores.gather(2, labels.clamp_min(0)[..., None])[..., 0] * is_target
            likelihood = -(chosen.sum(1)[:-1] / is_target.sum(1)[:-1]).mean()
            essence = scores[-1, len(prompts.essence.ids) - 1]
            divergence = (essence.exp() * (essence - before)).sum()
            decay = delta.norm() / hidden.norm() ** 2 if bool(delta.any()) else 0.0
            loss = likelihood + settings.kl_weight * divergence + settings.weight_decay * decay
            probable = bool((logits.argmax(-1)[is_target] == labels[is_target]).all())
            if probable and reached is None:
                reached = step
            struck = settings.early_stopping == "mpes" and reached is not None
            if step == settings.steps - 1:
                break
            loss.backward()
            adam.step()
            with torch.no_grad():
                radius = settings.max_norm * hidden.norm()
                if delta.norm() > radius:
                    delta *= radius / delta.norm()
            if struck:
                step += 1
                break
    found = delta.detach()
    return found, hidden + found, step


@torch.no_grad()
def write_batch(
    model: Any,
    blocks: Any,
    modules: list[Any],
    prompts: list[FactPrompts],
    targets: torch.Tensor,
    covariances: list[torch.Tensor],
    preservation_weight: float,
) -> list[torch.Tensor]:
    """Spreads the targets over the modules, one dense float64 solve each; returns the deltas without applying them."""
    device = model.get_input_embeddings().weight.device
    deltas = []
    for place, module in enumerate(modules):
        seen: dict[str, torch.Tensor] = {}
        keys, outputs = [], []
        with on_input(module, partial(seen.__setitem__, "keys")):
            for fact in prompts:
                ids, mask = padded([row.ids for row in fact.rows], device)
                model(input_ids=ids, attention_mask=mask, use_cache=False)
                subject = torch.tensor([row.subject_index for row in fact.rows], device=device)
                keys.append(seen["keys"][torch.arange(len(ids), device=device), subject].float().mean(0))
        with on_output(blocks[-1], partial(seen.__setitem__, "hidden")):
            for fact in prompts:
                ids = torch.tensor([fact.rows[0].ids], device=device)
                model(input_ids=ids, use_cache=False)
                outputs.append(seen["hidden"][0, fact.rows[0].subject_index].float())
        stacked = torch.stack(keys).double()
        residual = (targets.double() - torch.stack(outputs).double()) / (len(modules) - place)
        system = preservation_weight * covariances[place].to(device).double() + stacked.T @ stacked
        solved = torch.linalg.solve(system, stacked.T)
        deltas.append((residual.T @ solved.T).float())
    return deltas
