"""The target search: for each fact, the increment at the subject's last token that makes the model say the target.

What is minimised, inside a ball, is in `objective.py`. Most-Probable Early Stopping (MPES, arXiv 2502.01636, section
4.1) ends a fact's search once every token of its target is the most probable one in every context. Facts are
independent, so many are searched at once, and a fact that stops leaves its place to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..devices import free_memory
from ..prompts import FactPrompts
from ..residual import ResidualPath
from .forward import FullForward, input_device
from .in_context import InContextPrompts, Inference
from .objective import Objective
from .rows import SearchRows, View
from .settings import SLOTS_ON_CPU, SearchSettings


ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
MOMENTUM = 0.5
LEAST_GAIN = 0.02  # share of the objective
MOST_SLOTS = 256


@dataclass(frozen=True)
class SearchResult:
    """What the search found, one entry per fact (F).

    Args:
        increments (`torch.Tensor`): (F, d_model), for the output of the last edited module; float32 or wider.
        targets (`torch.Tensor`): (F, d_model), the block output that results for the bare prompt.
        keys (`torch.Tensor`): (F, rows, d_in), inputs of the first edited module at the subject, bare prompt first.
        steps (`torch.LongTensor`): (F,) updates made.
        converged (`torch.BoolTensor`): (F,) every target token was most probable in every context at the last
            evaluation (which MPES' extra steps follow).
        probability (`torch.Tensor`): (F,) probability of the target (geometric mean over its tokens, mean over
            contexts) at the last evaluation.
        failed (`torch.BoolTensor`): (F,) the objective was not finite.
        outputs (`torch.Tensor`): (F, d_model), of the last edited module for the bare prompt, without the increment.
    """

    increments: torch.Tensor
    targets: torch.Tensor
    keys: torch.Tensor
    steps: torch.Tensor
    converged: torch.Tensor
    probability: torch.Tensor
    failed: torch.Tensor
    outputs: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """The fields, in order."""
        return [getattr(self, field.name) for field in fields(self)]

    def of(self, facts: Sequence[int]) -> SearchResult:
        """The result of some of the facts."""
        return SearchResult(*(tensor[list(facts)] for tensor in self.tensors()))


def search_groups(prompts: Sequence[FactPrompts], settings: SearchSettings) -> list[list[int]]:
    """The groups in which facts are searched, as places in `prompts`: of about the same size and as much work each.

    What a fact's search finds depends, by rounding, on the facts that are run beside it, and a fact at a tie may stop
    a step sooner or later for it. Groups are the same for any number of processes, and so is what they find. Their
    number is a power of two, so that processes get equal shares; facts of other numbers of rows, which have companions
    (`shared_keys.py`), make further groups.
    """
    by_rows: dict[int, list[int]] = {}
    for place, each in enumerate(prompts):
        by_rows.setdefault(len(each.rows), []).append(place)
    groups = []
    for places in by_rows.values():
        count = 1 << math.ceil(math.log2(max(1.0, len(places) / settings.most_in_group)))
        order = sorted(places, key=lambda place: _suffix_length(prompts[place]))
        groups += [order[start::count] for start in range(count)]
    return groups


def search_targets(
    forward: FullForward,
    prompts: Sequence[FactPrompts],
    settings: SearchSettings,
    on_finished: Callable[[int], None] | None = None,
) -> SearchResult:
    """Searches the target vectors of many facts at once.

    Args:
        forward (`FullForward`): How the model is run, from `choose_forward`.
        prompts (`Sequence[FactPrompts]`): The facts as token sequences; for LTI `InContextPrompts`.
        settings (`SearchSettings`): Settings of the objective and the optimiser.
        on_finished (`Callable[[int], None]`, *optional*): Called with the number of facts that have just finished.

    Returns:
        `SearchResult`

    Raises:
        torch.OutOfMemoryError: if not even one fact at a time fits.
        ValueError: for LTI, if prompts are no `InContextPrompts`.
    """
    order = sorted(range(len(prompts)), key=lambda i: _suffix_length(prompts[i]))
    forward.prepare(SearchRows.from_prompts([prompts[i] for i in order], input_device(forward.model)))
    inference = None
    if settings.infers:
        told = [each for i in order if isinstance(each := prompts[i], InContextPrompts)]
        if len(told) < len(order):
            raise ValueError("LTI compares with prompts that tell the fact: encode facts with encode_in_context.")
        inference = Inference(forward, told, settings.final_weight, settings.middle_weight, settings.middle_block)
    found = _Search(forward, settings, on_finished, inference).run()
    original = torch.empty(len(order), dtype=torch.long)
    original[torch.tensor(order)] = torch.arange(len(order))
    return SearchResult(*(tensor[original.to(tensor.device)] for tensor in found))


def _suffix_length(prompts: FactPrompts) -> int:
    return max(len(row.ids) - row.subject_index for row in prompts.rows)


class _Search:
    """The optimisation itself: one Adam over a (facts, d_model) tensor, each fact with its own step count.

    A step waits for the device once, to learn which facts have finished.
    """

    def __init__(
        self,
        forward: FullForward,
        settings: SearchSettings,
        on_finished: Callable[[int], None] | None,
        inference: Inference | None,
    ) -> None:
        self.forward = forward
        self.settings = settings
        self.on_finished = on_finished
        base = forward.base
        self.device = base.hidden.device
        self.dtype = torch.promote_types(base.hidden.dtype, torch.float32)
        self.path = forward.path or ResidualPath()
        # The optimiser works in units of the residual stream, whatever stands between it and the module.
        with torch.no_grad():
            self.unit = self.path.unit(base.module_output).to(self.device, self.dtype)
        self.length = base.hidden.to(self.dtype).norm(dim=-1, keepdim=True)
        self.count = count = len(base.hidden)
        self.slots = settings.slots or slots_that_fit(forward, settings.infers)
        make: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self.delta, self.mean, self.square = (torch.zeros(count, base.hidden.shape[-1], **make) for _ in range(3))
        self.steps = torch.zeros(count, dtype=torch.long, device=self.device)
        self.reached = torch.full_like(self.steps, -1)  # the step at which MPES struck
        self.best = torch.full((count,), torch.inf, **make)  # the objective when it last gained
        self.gained = torch.zeros_like(self.steps)  # and the step
        self.converged = torch.zeros(count, dtype=torch.bool, device=self.device)
        self.failed = torch.zeros_like(self.converged)
        self.probability = torch.zeros(count, **make)
        self.objective = Objective(forward, settings, self.unit, self.length, inference)

    def run(self) -> tuple[torch.Tensor, ...]:
        waiting = list(range(self.count))
        active: list[int] = []
        view: View | None = None
        while active or waiting:
            if waiting and len(active) < self.slots:
                free = self.slots - len(active)
                active, waiting, view = active + waiting[:free], waiting[free:], None
            if view is None:
                self.objective.begin(active)
                facts = torch.tensor(active, device=self.forward.rows.ids.device)
                view = self.forward.view(facts)
            try:
                finished = self._step(view, active)
            except torch.OutOfMemoryError:
                if len(active) == 1:
                    raise
                # Facts keep what they have reached, so those beyond half of the places just wait for another turn.
                self.slots = max(1, len(active) // 2)
                active, waiting, view = active[: self.slots], active[self.slots :] + waiting, None
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            if any(finished):
                self.objective.forget([fact for fact, done in zip(active, finished) if done])
                active, view = [fact for fact, done in zip(active, finished) if not done], None
                if self.on_finished is not None:
                    self.on_finished(sum(finished))
        return self._result()

    def _step(self, view: View, active: list[int]) -> list[bool]:
        """Evaluates the active facts and updates those that go on; returns which ones have finished."""
        places = view.facts.to(self.device)
        current = self.delta[places].requires_grad_()
        objective, probable, likelihood = self.objective.evaluate(view, places, active, current)
        bad = ~torch.isfinite(objective)
        steps = self.steps[places]
        reached = torch.where(probable & (self.reached[places] < 0), steps, self.reached[places])
        self.reached[places] = reached
        done = bad | (steps >= self.settings.steps - 1)
        leaving = torch.zeros_like(done)  # with one more update, which is not looked at again
        if self.settings.early_stopping == "mpes":
            extra = self.settings.extra_steps
            done |= (reached >= 0) & (steps - reached >= extra)
            leaving = (reached >= 0) & (steps - reached == extra - 1)
            done |= (reached < 0) & self._stuck(places, objective.detach(), steps)
        staying, finished = torch.stack([~done, done | leaving]).tolist()  # the one wait for the device
        if any(staying):
            (gradient,) = torch.autograd.grad(torch.where(done, 0.0, objective).sum(), current)
            self._update(places, current.detach(), gradient, steps, done)
        self.converged[places], self.probability[places] = probable & ~bad, likelihood
        self.failed[places] |= bad
        return finished

    def _stuck(self, places: torch.Tensor, objective: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Whether the objective (A,) has not gained for so long that it hardly will."""
        gains = objective < self.best[places] * (1 - LEAST_GAIN)
        self.best[places] = torch.where(gains, objective, self.best[places])
        self.gained[places] = torch.where(gains, steps, self.gained[places])
        patience = self.settings.patience
        return (steps - self.gained[places] >= patience) & (patience > 0)

    def _result(self) -> tuple[torch.Tensor, ...]:
        delta = torch.where(self.failed[:, None], 0.0, self.delta)
        increments = delta * self.unit
        base = self.forward.base
        output = base.module_output.to(self.device)
        output = output.to(self.dtype) if self.path.norm is None else output
        with torch.no_grad():
            change = self.path.push(output, increments.to(output)).to(self.dtype)
        targets = base.hidden.to(self.dtype) + change
        progress = (self.steps, self.converged, self.probability, self.failed)
        return increments, targets, base.keys, *progress, base.module_output.to(self.device, self.dtype)

    def _update(
        self,
        places: torch.Tensor,
        delta: torch.Tensor,
        gradient: torch.Tensor,
        steps: torch.Tensor,
        done: torch.Tensor,
    ) -> None:
        """One step of the optimiser, then the projection onto the ball; none for those done."""
        step = self._adam_step if self.settings.optimizer == "adam" else self._normalized_step
        moved = delta - step(places, gradient, steps)
        radius = self.settings.max_norm * self.length[places]
        norm = moved.norm(dim=-1, keepdim=True)
        moved = torch.where(norm > radius, moved * (radius / norm.clamp_min(1e-30)), moved)
        self.delta[places] = torch.where(done[:, None], delta, moved)
        self.steps[places] = steps + (~done).long()

    def _adam_step(self, places: torch.Tensor, gradient: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Adam with a step count per fact."""
        beta1, beta2 = ADAM_BETAS
        mean = self.mean[places].lerp(gradient, 1 - beta1)
        square = self.square[places] * beta2 + (1 - beta2) * gradient.square()
        self.mean[places], self.square[places] = mean, square
        count = (steps + 1)[:, None].to(self.dtype)
        return self.settings.lr * (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)).sqrt() + ADAM_EPS)

    def _normalized_step(self, places: torch.Tensor, gradient: torch.Tensor, _steps: torch.Tensor) -> torch.Tensor:
        """The gradient's direction, with momentum, in units of ||h||.

        Adam's equal step in every coordinate is far longer than the ball is wide, so that it keeps little more of the
        gradient than its signs; the direction itself reaches the target in fewer steps and writes better (measured in
        docs/benchmarks.md).
        """
        direction = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        mean = self.mean[places] * MOMENTUM + direction
        self.mean[places] = mean
        # After MPES has struck a step is half as long, or the last one, which is not looked at, might go too far.
        share = torch.where(self.reached[places] < 0, 1.0, 0.5)[:, None].to(self.dtype)
        return self.settings.lr * share * self.length[places] * mean


def slots_that_fit(forward: FullForward, infers: bool = False) -> int:
    """How many facts to search at once: what half of the free memory holds, by a rough count of what is kept for the
    backward pass; an estimate that is too high is corrected when memory runs out."""
    device = forward.base.hidden.device
    if device.type != "cuda":
        return SLOTS_ON_CPU
    rows, base = forward.rows, forward.base
    suffix = int((rows.lengths - rows.subject).max())
    reads = int(rows.read_mask.sum()) / len(base.hidden)
    if infers:  # the reference beside the answers, and both of the middle block
        reads = 2 * reads + 2 * rows.rows_per_fact
    vocabulary = forward.model.get_output_embeddings().weight.shape[0]
    wide, size = base.hidden.shape[-1] * 16 + base.keys.shape[-1] * 6, base.hidden.element_size()
    blocks = len(forward.blocks) - forward.block_index
    per_fact = rows.rows_per_fact * suffix * blocks * wide * size + reads * vocabulary * (size + 20)
    return int(max(1, min(MOST_SLOTS, free_memory(device) / 2 / per_fact)))
