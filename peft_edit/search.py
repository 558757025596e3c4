"""The target search: for each fact, the increment at the subject's last token that makes the model say the target.

The objective is that of ROME and MEMIT (arXiv 2202.05262, eq. 4; arXiv 2210.07229, eq. 16): mean negative
log-likelihood of the target over the contexts, plus the KL divergence on the essence prompt, plus a weight decay,
inside a ball. Most-Probable Early Stopping (MPES, arXiv 2502.01636, section 4.1) ends a fact's search once every
token of its target is the most probable one in every context. Facts are independent, so many are searched at once, and
a fact that stops leaves its place to the next.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .forward import FullForward, SearchRows, SplitForward, View
from .prompts import FactPrompts
from .residual import ResidualPath


ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search; the defaults are the paper's.

    Args:
        early_stopping (`str`): `"mpes"` or `"none"`.
        extra_steps (`int`): Updates after the target has become most probable.
        steps (`int`): Evaluations of the objective at most; the last one is not followed by an update (as in MEMIT).
        lr (`float`): Adam's learning rate.
        weight_decay (`float`): Factor of `||delta|| / ||h||^2`.
        kl_weight (`float`): Factor of the KL divergence on the essence prompt.
        max_norm (`float`): Radius of the ball as a share of `||h||`.
        slots (`int`): Facts searched at the same time.
    """

    early_stopping: str = "mpes"
    extra_steps: int = 1
    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    max_norm: float = 0.75
    slots: int = 32


@dataclass(frozen=True)
class SearchResult:
    """What the search found, one entry per fact (F).

    Args:
        increments (`torch.Tensor`): (F, d_model), for the output of the last edited module; float32 or wider.
        targets (`torch.Tensor`): (F, d_model), the block output that results for the bare prompt.
        steps (`torch.LongTensor`): (F,) updates made.
        converged (`torch.BoolTensor`): (F,) every target token was most probable in every context at the end.
        probability (`torch.Tensor`): (F,) probability of the target (geometric mean over its tokens, mean over
            contexts) at the last evaluation.
        failed (`torch.BoolTensor`): (F,) the objective was not finite.
    """

    increments: torch.Tensor
    targets: torch.Tensor
    steps: torch.Tensor
    converged: torch.Tensor
    probability: torch.Tensor
    failed: torch.Tensor


def search_targets(
    model: Any,
    blocks: Sequence[nn.Module],
    block_index: int,
    module: nn.Module,
    path: ResidualPath | None,
    prompts: Sequence[FactPrompts],
    settings: SearchSettings,
    on_finished: Callable[[int], None] | None = None,
    force_full: bool = False,
) -> SearchResult:
    """Searches the target vectors of many facts at once.

    Args:
        model (`nn.Module`): The causal language model with its adapters in place, in eval mode.
        blocks (`Sequence[nn.Module]`): Its decoder blocks.
        block_index (`int`): Index of the block that holds the last edited module.
        module (`nn.Module`): The last edited module; increments are added to its output.
        path (`ResidualPath`, *optional*): How that output reaches the residual stream; None if unknown.
        prompts (`Sequence[FactPrompts]`): The facts as token sequences.
        settings (`SearchSettings`): Settings of the objective and the optimiser.
        on_finished (`Callable[[int], None]`, *optional*): Called with the number of facts that have just finished.
        force_full (`bool`): Run whole sequences even where the forward pass can be split.

    Returns:
        `SearchResult`
    """
    order = sorted(range(len(prompts)), key=lambda i: _suffix_length(prompts[i]))
    device = model.get_input_embeddings().weight.device
    rows = SearchRows.from_prompts([prompts[i] for i in order], "cpu" if device.type == "meta" else device)
    forward = _choose_forward(model, list(blocks), block_index, module, path, rows, force_full)
    found = _Search(forward, path, settings, on_finished).run()
    original = torch.empty(len(order), dtype=torch.long)
    original[torch.tensor(order)] = torch.arange(len(order))
    return SearchResult(*(tensor[original.to(tensor.device)] for tensor in found))


def _suffix_length(prompts: FactPrompts) -> int:
    return max(len(row.ids) - row.subject_index for row in prompts.rows)


def _choose_forward(
    model: Any,
    blocks: list[nn.Module],
    block_index: int,
    module: nn.Module,
    path: ResidualPath | None,
    rows: SearchRows,
    force_full: bool,
) -> FullForward:
    """The split forward pass where it gives the full one's answer on the first fact, else the full one."""
    full = FullForward(model, blocks, block_index, module, path)
    if path is not None and not force_full:
        split = SplitForward(model, blocks, block_index, module, path)
        try:
            split.prepare(rows)
            agrees = _agree(split, full)
        except (TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            agrees, reason = False, f" ({type(error).__name__}: {error})"
        else:
            reason = ""
        if agrees:
            return split
        warnings.warn(
            f"The forward pass of {type(model).__name__} cannot be split at the subject{reason}; the target search "
            "runs whole sequences instead: the same result, only slower.",
            stacklevel=2,
        )
    full.prepare(rows)
    return full


def _agree(split: SplitForward, full: FullForward) -> bool:
    """Whether both ways give the same logits for the first fact with an arbitrary increment."""
    full.rows, full.base = split.rows, split.base
    first = torch.zeros(1, dtype=torch.long, device=split.rows.ids.device)
    output = split.base.module_output[:1]
    generator = torch.Generator().manual_seed(0)
    increment = torch.randn(output.shape, generator=generator).to(output)
    increment = 0.3 * increment * output.norm() / increment.norm()
    with torch.no_grad():
        one = split.logits(split.view(first), increment).double()
        other = full.logits(full.view(first), increment).double()
    if not (one.isfinite().all() and other.isfinite().all()):
        return True  # nothing to compare; the search itself reports facts that are not finite
    spread = float((other - other.mean(-1, keepdim=True)).abs().max())
    return float((one - other).abs().max()) <= 0.4 * math.sqrt(torch.finfo(output.dtype).eps) * max(spread, 1e-3)


class _Search:
    """The optimisation itself: one Adam over a (slots, d_model) tensor, each fact with its own step count."""

    def __init__(
        self,
        forward: FullForward,
        path: ResidualPath | None,
        settings: SearchSettings,
        on_finished: Callable[[int], None] | None,
    ) -> None:
        self.forward = forward
        self.settings = settings
        self.on_finished = on_finished
        base = forward.base
        self.device = base.hidden.device
        self.dtype = torch.promote_types(base.hidden.dtype, torch.float32)
        self.path = path or ResidualPath()
        output = base.module_output.to(self.device, self.dtype)
        # The optimiser works in units of the residual stream, whatever stands between it and the module.
        with torch.no_grad():
            unit = (path or ResidualPath()).unit(base.module_output).to(self.device, self.dtype)
        self.unit = unit
        self.length = base.hidden.to(self.dtype).norm(dim=-1, keepdim=True)
        self.count = len(output)

    def run(self) -> tuple[torch.Tensor, ...]:
        count, width = self.count, self.forward.base.hidden.shape[-1]
        make: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        delta = torch.zeros(count, width, **make)
        self.mean = torch.zeros(count, width, **make)
        self.square = torch.zeros(count, width, **make)
        steps = torch.zeros(count, dtype=torch.long, device=self.device)
        reached = torch.full((count,), -1, dtype=torch.long, device=self.device)  # step at which MPES struck
        converged = torch.zeros(count, dtype=torch.bool, device=self.device)
        probability = torch.zeros(count, **make)
        failed = torch.zeros(count, dtype=torch.bool, device=self.device)
        waiting = torch.arange(count, device=self.device)
        active = waiting[:0]
        view: View | None = None
        while len(active) or len(waiting):
            free = self.settings.slots - len(active)
            if free and len(waiting):
                active, waiting, view = torch.cat([active, waiting[:free]]), waiting[free:], None
            if view is None:
                view = self.forward.view(active.to(self.forward.rows.ids.device))
            current = delta[active].requires_grad_()
            objective, probable, likelihood = self._evaluate(view, active, current)
            bad = ~torch.isfinite(objective)
            converged[active], probability[active] = probable & ~bad, likelihood
            failed[active] |= bad
            reached[active] = torch.where(probable & (reached[active] < 0), steps[active], reached[active])
            done = bad | (steps[active] >= self.settings.steps - 1)
            if self.settings.early_stopping == "mpes":
                waited = steps[active] - reached[active] >= self.settings.extra_steps
                done |= probable & waited  # an extra step that lost the target again is not the end
            finished = done.cpu()  # the one wait for the device per step
            if not bool(finished.all()):
                (gradient,) = torch.autograd.grad(objective[~done].sum(), current)
                going = active[~done]
                steps[going] += 1
                delta[going] = self._updated(going, delta[going], gradient[~done], steps[going])
            if bool(finished.any()):
                active, view = active[~done], None
                if self.on_finished is not None:
                    self.on_finished(int(finished.sum()))
        delta[failed] = 0.0
        increments = delta * self.unit
        with torch.no_grad():
            output = self.forward.base.module_output.to(self.device)
            change = (
                self.path.push(output.to(self.dtype), increments)
                if self.path.norm is None
                else (self.path.push(output, increments.to(output)).to(self.dtype))
            )
        targets = self.forward.base.hidden.to(self.dtype) + change
        return increments, targets, steps, converged, probability, failed

    def _evaluate(
        self, view: View, active: torch.Tensor, delta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Objective (A,), whether every target token is the most probable (A,), target probability (A,)."""
        rows_per_fact = self.forward.rows.rows_per_fact
        logits = self.forward.logits(view, delta * self.unit[active])
        labels, read_rows = view.labels.to(logits.device), view.read_rows.to(logits.device)
        is_target = labels >= 0
        target_rows, target_labels = read_rows[is_target], labels[is_target]
        target_logits = logits[is_target].to(self.dtype)
        scored = -nn.functional.cross_entropy(target_logits, target_labels, reduction="none").to(self.device)
        rows = target_rows.to(self.device)
        shape = (len(active) * rows_per_fact,)
        total = torch.zeros(shape, device=self.device, dtype=self.dtype).index_add(0, rows, scored)
        tokens = torch.zeros(shape, device=self.device, dtype=self.dtype).index_add(0, rows, torch.ones_like(scored))
        per_row = (total / tokens.clamp_min(1)).reshape(-1, rows_per_fact)[:, :-1]  # the essence row predicts nothing
        with torch.no_grad():
            missed = (target_logits.argmax(-1) != target_labels).to(self.device)
            misses = torch.zeros(shape, device=self.device).index_add(0, rows, missed.float())
            probable = misses.reshape(-1, rows_per_fact).sum(1) == 0
            likelihood = per_row.exp().mean(1)
        essence = logits[~is_target].to(self.dtype).log_softmax(-1)
        before = self.forward.base.essence[view.facts.to(self.forward.base.essence.device)].to(essence)
        divergence = (essence.exp() * (essence - before)).sum(-1).to(self.device)
        length = self.length[active]
        # The square root of a zero increment has no gradient; there the decay has none either.
        size = torch.where((delta == 0).all(-1), delta.new_zeros(()), delta.square().sum(-1).clamp_min(1e-30).sqrt())
        decay = size / length[:, 0].square()
        objective = -per_row.mean(1) + self.settings.kl_weight * divergence + self.settings.weight_decay * decay
        return objective, probable, likelihood

    def _updated(
        self, facts: torch.Tensor, delta: torch.Tensor, gradient: torch.Tensor, steps: torch.Tensor
    ) -> torch.Tensor:
        """One step of Adam with a step count per fact, then the projection onto the ball."""
        beta1, beta2 = ADAM_BETAS
        mean = self.mean[facts].lerp(gradient, 1 - beta1)
        square = self.square[facts] * beta2 + (1 - beta2) * gradient.square()
        self.mean[facts], self.square[facts] = mean, square
        count = steps[:, None].to(self.dtype)
        denominator = (square / (1 - beta2**count)).sqrt() + ADAM_EPS
        delta = delta - self.settings.lr * (mean / (1 - beta1**count)) / denominator
        radius = self.settings.max_norm * self.length[facts]
        norm = delta.norm(dim=-1, keepdim=True)
        return torch.where(norm > radius, delta * (radius / norm.clamp_min(1e-30)), delta)
