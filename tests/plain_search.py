"""The target search as a plain loop: one fact, one sequence at a time, the whole model, torch's own Adam."""

from __future__ import annotations

import torch

from peft_edit.hooks import on_output
from peft_edit.prompts import FactPrompts
from peft_edit.search import SearchSettings


def plain_search(model, block, module, prompts: FactPrompts, settings: SearchSettings, unit: float = 1.0):
    """The increment of the module's output, (d_model,), and the number of updates."""
    bare = prompts.rows[0]

    def logits_of(row, added=None):
        def add(hidden):
            shape = hidden.shape
            hidden = hidden.reshape(-1, shape[-1]).clone()
            hidden[row.subject_index] = hidden[row.subject_index] + added
            return hidden.reshape(shape)

        with on_output(module, (lambda hidden: None) if added is None else add):
            return model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]

    seen = {}
    with torch.no_grad(), on_output(block, lambda hidden: seen.update(hidden=hidden.detach())):
        logits_of(bare)
    hidden = seen["hidden"][0, bare.subject_index]
    with torch.no_grad():
        before = logits_of(prompts.essence)[-1].log_softmax(-1)
    delta = torch.zeros_like(hidden, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.lr)
    reached = None
    for step in range(settings.steps):
        adam.zero_grad()
        losses, probable = [], True
        for row in prompts.rows:
            target = torch.tensor(row.target_ids)
            scores = logits_of(row, unit * delta)[row.prompt_length - 1 : len(row.ids) - 1].log_softmax(-1)
            losses.append(-scores[torch.arange(len(target)), target].mean())
            probable = probable and bool((scores.argmax(-1) == target).all())
        essence = logits_of(prompts.essence, unit * delta)[-1].log_softmax(-1)
        divergence = (essence.exp() * (essence - before)).sum()
        decay = delta.norm() / hidden.norm() ** 2 if delta.any() else 0.0
        loss = torch.stack(losses).mean() + settings.kl_weight * divergence + settings.weight_decay * decay
        if probable and reached is None:
            reached = step
        struck = settings.early_stopping == "mpes" and reached is not None
        if step == settings.steps - 1 or (struck and step - reached >= settings.extra_steps):
            return unit * delta.detach(), step
        loss.backward()
        adam.step()
        with torch.no_grad():
            radius = settings.max_norm * hidden.norm()
            if delta.norm() > radius:
                delta *= radius / delta.norm()
        if struck and step - reached == settings.extra_steps - 1:
            return unit * delta.detach(), step + 1
    raise AssertionError("unreachable")
