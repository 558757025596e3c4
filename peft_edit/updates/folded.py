"""Rules that add an increment for each batch to the delta, and forget or constrain what came before."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..solve import Unmet, factorised
from .base import Task, Update


if TYPE_CHECKING:
    from ..memory import EditMemory


@dataclass(frozen=True, eq=False)
class Step:
    """A batch of k pairs on top of what there is.

    Args:
        keys (`torch.Tensor`): (k, d_in).
        residuals (`torch.Tensor`): (k, d_out), values less what the delta gives at the keys.
        gram (`torch.Tensor`, *optional*): (d_in, d_in), the sum of k kᵀ of all earlier pairs, for rules that want it.
        delta (`torch.Tensor`): (d_out, d_in), so far.
        task (`Task`): The module's problem.
    """

    keys: torch.Tensor
    residuals: torch.Tensor
    gram: torch.Tensor | None
    delta: torch.Tensor
    task: Task


class Folded(Update):
    """A rule whose delta is the sum of increments, one for each batch."""

    past_keys: bool = False  # whether `Step.gram` is wanted

    @abstractmethod
    def increment(self, step: Step) -> torch.Tensor:
        """What the batch adds to the delta: (d_out, d_in)."""

    def solution(self, memory: EditMemory, module: str, task: Task) -> FoldedSolution:
        known = memory.kept(module)
        if isinstance(known, FoldedSolution) and known.serves(self, task):
            return known
        solution = FoldedSolution.empty(self, task)
        for keys, values in memory.pairs.get(module, ()):
            solution, _ = solution.add(keys, values)
        return solution


@dataclass(frozen=True, eq=False)
class FoldedSolution:
    """The sum of increments so far.

    Args:
        update (`Folded`): The rule.
        task (`Task`): The module's problem.
        delta (`torch.Tensor`): (d_out, d_in).
        gram (`torch.Tensor`, *optional*): (d_in, d_in), of all pairs, where the rule wants it.
    """

    update: Folded
    task: Task
    delta: torch.Tensor
    gram: torch.Tensor | None

    @classmethod
    def empty(cls, update: Folded, task: Task) -> FoldedSolution:
        """No pairs."""
        d_in, d_out = task.shape
        delta = torch.zeros(d_out, d_in, device=task.device, dtype=task.dtype)
        return cls(update, task, delta, delta.new_zeros(d_in, d_in) if update.past_keys else None)

    @property
    def kept(self) -> Any:
        """Itself."""
        return self

    def serves(self, update: Folded, task: Task) -> bool:
        """Whether it is a solution of this task by this rule, where it is wanted."""
        same = self.task.penalties.same_as(task.penalties) and self.task.device == task.device
        return same and self.update == update

    def add(
        self, keys: torch.Tensor, values: torch.Tensor, rounds: int = 0, unmet: Unmet | None = None
    ) -> tuple[FoldedSolution, torch.Tensor]:
        """One batch more; these rules do not refine values. A budget that is exceeded scales the delta back to it."""
        self._check_rounds(rounds)
        wide = keys.to(self.delta)
        step = Step(wide, values.to(self.delta) - wide @ self.delta.T, self.gram, self.delta, self.task)
        delta = capped(self.delta + self.update.increment(step), self.task)
        gram = None if self.gram is None else torch.addmm(self.gram, wide.T, wide)
        return replace(self, delta=delta, gram=gram), values

    def _check_rounds(self, rounds: int) -> None:
        if rounds:
            raise ValueError(f"The update {self.update.name!r} does not refine values: set refinements=0.")


@dataclass(frozen=True)
class Forgetful(Folded):
    """`R Kᵀ (λp C + K Kᵀ + λn I)⁻¹` of the batch alone: MEMIT as published (arXiv 2210.07229, eq. 14)."""

    name = "forgetful"

    def increment(self, step: Step) -> torch.Tensor:
        return ridge_increment(step)


@dataclass(frozen=True)
class Sparse(Folded):
    """A ridge increment of which only the largest relative changes are kept (RECT, arXiv 2401.04700).

    Args:
        share (`float`): Share of the entries that are kept, largest |ΔW / W| first.
    """

    share: float = 0.4
    past_keys = True
    name = "sparse"

    def check(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"The share of entries that are kept must be in (0, 1], got {self.share!r}.")

    def increment(self, step: Step) -> torch.Tensor:
        whole = ridge_increment(step)
        weight = step.task.base_weight().to(whole) + step.delta
        return largest_changes(whole, weight, self.share)


@dataclass(frozen=True)
class Constrained(Folded):
    """Meets all pairs of a batch, at the least cost tr(Δ S Δᵀ), S = λp C + λn I (EMMET, arXiv 2403.14236)."""

    name = "constrained"

    def increment(self, step: Step) -> torch.Tensor:
        return constrained_increment(step.keys, step.residuals, step.task.system_factor)


@dataclass(frozen=True)
class RankOne(Folded):
    """One pair after the other is met exactly, each by a matrix of rank one (ROME, arXiv 2202.05262, eq. 2)."""

    name = "rank_one"
    batch_size = 1

    def increment(self, step: Step) -> torch.Tensor:
        total = torch.zeros_like(step.delta)
        for key, residual in zip(step.keys, step.residuals):
            rest = residual - total @ key
            total = total + constrained_increment(key[None], rest[None], step.task.system_factor)
        return total


def capped(delta: torch.Tensor, task: Task) -> torch.Tensor:
    """The delta, scaled back to the task's budget if it exceeds it."""
    cap = task.penalties.max_norm
    return delta if cap is None or float(delta.norm()) <= cap else delta * (cap / delta.norm())


def ridge_increment(step: Step) -> torch.Tensor:
    """`R Kᵀ (S + KₚᵀKₚ + K Kᵀ)⁻¹` of a batch, with the system S and the earlier keys where the step has them."""
    system = step.task.system()
    if step.gram is not None:
        system += step.gram
    factor = factorised(torch.addmm(system, step.keys.T, step.keys), 0.0)
    return step.residuals.T @ torch.cholesky_solve(step.keys.T, factor).T


def constrained_increment(keys: torch.Tensor, residuals: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The Δ of least tr(Δ S Δᵀ) with Δ k = r for every pair: `Rᵀ (K S⁻¹Kᵀ)⁻¹ K S⁻¹`.

    Args:
        keys (`torch.Tensor`): (k, d_in).
        residuals (`torch.Tensor`): (k, d_out).
        factor (`torch.Tensor`): (d_in, d_in), lower Cholesky factor of S.

    Raises:
        ValueError: if the keys are linearly dependent, so that they cannot all be met.
    """
    half = torch.linalg.solve_triangular(factor, keys.T, upper=False)
    try:
        inner = factorised(half.T @ half, 0.0)
    except ValueError as error:
        raise ValueError(
            "The keys of a batch are linearly dependent, so equality constraints cannot hold for all of its facts: "
            "use smaller batches, or a ridge update."
        ) from error
    weights = torch.cholesky_solve(residuals, inner)  # (k, d_out)
    return weights.T @ torch.linalg.solve_triangular(factor.T, half, upper=True).T


def largest_changes(change: torch.Tensor, weight: torch.Tensor, share: float) -> torch.Tensor:
    """The matrix with all but a share of its entries zero: those of the largest |change / weight| stay."""
    relative = (change / weight).abs().nan_to_num(0.0, posinf=torch.inf)
    kept = max(1, round(share * change.numel()))
    threshold = relative.flatten().kthvalue(change.numel() - kept + 1).values
    return torch.where(relative >= threshold, change, torch.zeros_like(change))
