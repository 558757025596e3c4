"""UltraEdit's rule (arXiv 2505.14679): value gradients, normalised over all facts seen, are the wanted changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..solve import Unmet, factorised
from .base import Task
from .folded import Folded, FoldedSolution, Step, capped, ridge_increment


if TYPE_CHECKING:
    from ..memory import EditMemory


@dataclass(frozen=True)
class Moments:
    """Mean and spread of the features of all pairs so far (lifelong normalisation).

    Args:
        count (`int`): N, pairs seen.
        mean (`torch.Tensor`): (d,).
        square (`torch.Tensor`): (d,), the sum of squared deviations.
    """

    count: int
    mean: torch.Tensor
    square: torch.Tensor

    @classmethod
    def empty(cls, like: torch.Tensor) -> Moments:
        """Nothing seen; (d,) as `like`."""
        return cls(0, torch.zeros_like(like), torch.zeros_like(like))

    def add(self, features: torch.Tensor) -> Moments:
        """With n more, (n, d): `μ += n δ / (N + n)`, `s² += n Var + N n δ² / (N + n)` with `δ = mean − μ`.

        Var is the sample variance, with n − 1 below, as in the published code; that of a single pair is 0.
        """
        n = len(features)
        total = self.count + n
        shift = features.mean(0) - self.mean
        within = n * features.var(0) if n > 1 else torch.zeros_like(shift)
        square = self.square + within + shift.square() * (self.count * n / total)
        return Moments(total, self.mean + shift * (n / total), square)

    def normalised(self, features: torch.Tensor) -> torch.Tensor:
        """`(x − μ) / σ`, with `σ² = s² / (N − 1)`; (n, d). Where nothing has varied yet it is 0."""
        deviation = (self.square / max(1, self.count - 1)).sqrt()
        scaled = (features - self.mean) / deviation.clamp_min(torch.finfo(features.dtype).tiny)
        return torch.where(deviation > 0, scaled, torch.zeros_like(scaled))


@dataclass(frozen=True)
class Normalized(Folded):
    """One step down the normalised value gradients, written by ridge regression on the batch alone.

    Keys h and gradients g of a pair, normalised together to ĥ and ĝ, give the wanted change `v = −η ||ĥ||² ĝ`, and the
    batch adds `VᵀH (HᵀH + λp C + λn I)⁻¹`; λp = 0 and λn = 1 as published. Pairs are stored as they were measured, so
    statistics and increments are made again from them, also without a fact that is taken out.

    Args:
        learning_rate (`float`): How long a typical wanted change is, in units of the module's own output on ordinary
            text: `η = learning_rate · sqrt(tr(W0 C W0ᵀ)) / (d_in sqrt(d_out))`.
    """

    learning_rate: float = 0.5
    name = "normalized"
    from_gradients = True

    def check(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"The learning rate must be > 0, got {self.learning_rate!r}.")

    def increment(self, step: Step) -> torch.Tensor:
        penalties = step.task.penalties
        if penalties.preservation_weight or not penalties.norm_penalty:
            return ridge_increment(step)
        # Without C the system is as small as the batch: Vᵀ (H Hᵀ + λn I)⁻¹ H.
        factor = factorised(step.keys @ step.keys.T, penalties.norm_penalty)
        return torch.cholesky_solve(step.residuals, factor).T @ step.keys

    def solution(self, memory: EditMemory, module: str, task: Task) -> NormalizedSolution:
        known = memory.kept(module)
        if isinstance(known, NormalizedSolution) and known.serves(self, task):
            return known
        solution: Any = NormalizedSolution.begin(self, task)
        for keys, gradients in memory.pairs.get(module, ()):
            solution, _ = solution.add(keys, gradients)
        return solution

    def step_size(self, task: Task) -> float:
        """η."""
        d_in, d_out = task.shape
        weight = task.base_weight().to(task.device, task.dtype)
        covariance = task.penalties.covariance.to(weight)
        length = float((weight @ covariance * weight).sum()) ** 0.5
        return self.learning_rate * length / (d_in * d_out**0.5)


@dataclass(frozen=True, eq=False)
class NormalizedSolution(FoldedSolution):
    """The sum of increments so far, and the statistics that the next batch is normalised by.

    Args:
        moments (`Moments`): Of (d_in + d_out) features.
        step_size (`float`): η.
    """

    moments: Moments
    step_size: float

    @classmethod
    def begin(cls, update: Normalized, task: Task) -> NormalizedSolution:
        """No pairs."""
        d_in, d_out = task.shape
        delta = torch.zeros(d_out, d_in, device=task.device, dtype=task.dtype)
        return cls(update, task, delta, None, Moments.empty(delta.new_zeros(d_in + d_out)), update.step_size(task))

    def add(
        self, keys: torch.Tensor, values: torch.Tensor, rounds: int = 0, unmet: Unmet | None = None
    ) -> tuple[NormalizedSolution, torch.Tensor]:
        """One batch more.

        Args:
            keys (`torch.Tensor`): (k, d_in).
            values (`torch.Tensor`): (k, d_out), gradients of the loss with respect to the module's output.
            rounds (`int`): Must be 0.
        """
        self._check_rounds(rounds)
        wide, gradients = keys.to(self.delta), values.to(self.delta)
        moments = self.moments.add(torch.cat([wide, gradients], dim=1))
        normalised = moments.normalised(torch.cat([wide, gradients], dim=1))
        hidden, slope = normalised.split([wide.shape[1], gradients.shape[1]], dim=1)
        wanted = -self.step_size * hidden.square().sum(1, keepdim=True) * slope
        step = Step(wide, wanted, None, self.delta, self.task)
        delta = capped(self.delta + self.update.increment(step), self.task)
        return replace(self, delta=delta, moments=moments), values
