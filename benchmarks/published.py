"""The editing procedure as the published research scripts arrange it, for comparison; written for this benchmark.

One fact at a time, all its sequences padded into one batch, whole sequences through the whole model forward and back,
logits at every position, torch's own Adam on one vector; keys and outputs read by full passes for every edited layer;
one dense solve per layer and batch; weights changed in place. Contexts, objective, ball and stopping rule are those of
peft-edit, so both do the same mathematics. The update rules are the equations of their papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from peft_edit.hooks import on_input, on_output
from peft_edit.prompts import FactPrompts
from peft_edit.search import SearchSettings


# Of a module's name, keys (n, d_in) and residuals (n, d_out): what to add to its weight, (d_out, d_in). float64.
Rule = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
Moments = Mapping[str, torch.Tensor]


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
def read_batch(
    model: Any, block: Any, module: Any, prompts: list[FactPrompts], targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (n, d_in) of a module, and what the output of the last edited block lacks of the targets: (n, d_out).

    As in MEMIT's code the bare prompt counts half of a key, the contexts together the other half. float64.
    """
    device = model.get_input_embeddings().weight.device
    seen: dict[str, torch.Tensor] = {}
    keys, outputs = [], []
    with on_input(module, partial(seen.__setitem__, "keys")):
        for fact in prompts:
            ids, mask = padded([row.ids for row in fact.rows], device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            subject = torch.tensor([row.subject_index for row in fact.rows], device=device)
            rows = seen["keys"][torch.arange(len(ids), device=device), subject].double()
            keys.append((rows[0] + rows[1:].mean(0)) / 2 if len(rows) > 1 else rows[0])
    with on_output(block, partial(seen.__setitem__, "hidden")):
        for fact in prompts:
            ids = torch.tensor([fact.rows[0].ids], device=device)
            model(input_ids=ids, use_cache=False)
            outputs.append(seen["hidden"][0, fact.rows[0].subject_index].double())
    return torch.stack(keys), targets.double() - torch.stack(outputs)


@torch.no_grad()
def write_batch(
    model: Any,
    block: Any,
    modules: Mapping[str, Any],
    prompts: list[FactPrompts],
    targets: torch.Tensor,
    rule: Rule,
) -> dict[str, torch.Tensor]:
    """Spreads the targets over the modules and adds to each, in place, what `rule(name, keys, residuals)` says.

    Returns the increments, (d_out, d_in).
    """
    increments = {}
    for place, (name, module) in enumerate(modules.items()):
        keys, missing = read_batch(model, block, module, prompts, targets)
        increments[name] = increment = rule(name, keys, missing / (len(modules) - place))
        weight = module.weight
        weight += (increment.T if isinstance(module, Conv1D) else increment).to(weight)
    return increments


def memit(moments: Moments, preservation_weight: float, past: bool = False) -> Rule:
    """`R K (λ C + KᵀK)⁻¹` (arXiv 2210.07229, eq. 14); with `past`, the keys of earlier batches join the system."""
    grams: dict[str, Any] = dict.fromkeys(moments, 0.0)

    def rule(name: str, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        gram = keys.T @ keys
        system = preservation_weight * moments[name].to(keys) + grams[name] + gram
        if past:
            grams[name] = grams[name] + gram
        return torch.linalg.solve(system, keys.T @ residuals).T

    return rule


def alphaedit(moments: Moments, threshold: float, penalty: float) -> Rule:
    """`R K P (KₚᵀKₚ P + KᵀK P + L2 I)⁻¹`, P the projector on small eigenvalues of C (arXiv 2410.02355)."""
    grams: dict[str, Any] = dict.fromkeys(moments, 0.0)
    projectors = {}
    for name, moment in moments.items():
        values, vectors = torch.linalg.eigh(moment.double())
        null = vectors[:, values <= threshold * values.mean()]
        projectors[name] = null @ null.T

    def rule(name: str, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        projector = projectors[name].to(keys)
        grams[name] = grams[name] + keys.T @ keys
        system = projector @ grams[name] + penalty * torch.eye(keys.shape[1]).to(keys)
        return torch.linalg.solve(system, projector @ keys.T @ residuals).T

    return rule


def emmet(moments: Moments) -> Rule:
    """`R (K C⁻¹ Kᵀ)⁻¹ K C⁻¹`: every fact of the batch met exactly (arXiv 2403.14236)."""

    def rule(name: str, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        whitened = torch.linalg.solve(moments[name].to(keys), keys.T)
        return residuals.T @ torch.linalg.solve(keys @ whitened, whitened.T)

    return rule


def norm_constrained(moments: Moments, preservation_weight: float, norm_weight: float) -> Rule:
    """`Δ = Σ v kᵀ (λp C + Σ k kᵀ + λn I)⁻¹` over all facts so far, less what is there (arXiv 2502.01636, eq. 7)."""
    grams: dict[str, Any] = dict.fromkeys(moments, 0.0)
    crosses: dict[str, Any] = dict.fromkeys(moments, 0.0)
    deltas: dict[str, Any] = {}

    def rule(name: str, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        before = deltas.get(name, residuals.new_zeros(residuals.shape[1], keys.shape[1]))
        grams[name] = grams[name] + keys.T @ keys
        crosses[name] = crosses[name] + keys.T @ (residuals + keys @ before.T)
        penalty = preservation_weight * moments[name].to(keys) + norm_weight * torch.eye(keys.shape[1]).to(keys)
        deltas[name] = torch.linalg.solve(grams[name] + penalty, crosses[name]).T
        return deltas[name] - before

    return rule
