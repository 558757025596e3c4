"""The cumulative ridge solution (ENCORE; with λn = 0 and no budget MEMIT with past keys), as it is or mapped."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..running import RunningSolution
from ..solve import Unmet
from .base import Task, Update


if TYPE_CHECKING:
    from ..memory import EditMemory


@dataclass(frozen=True)
class Ridge(Update):
    """`Δ = B (λp C + KᵀK + λ I)⁻¹` for all pairs so far (arXiv 2502.01636, eq. 7, on the cumulative delta)."""

    name = "ridge"

    def solution(self, memory: EditMemory, module: str, task: Task) -> RunningSolution:
        return memory.solution(module, task.penalties, task.shape, task.device, task.store)


@dataclass(frozen=True)
class NullSpace(Update):
    """Changes only where ordinary keys have hardly any energy (AlphaEdit, arXiv 2410.02355).

    With P the projector on the eigenvectors of C whose eigenvalue is small, the published step
    `R KᵀP (P (KₚᵀKₚ + KᵀK) P + L2 I)⁻¹` is the recursive form of a cumulative ridge solution for the keys `P k` with
    λp = 0 and λn = L2, and is solved as such.

    Args:
        threshold (`float`): Largest eigenvalue of C that counts as none, as a share of the mean one, tr(C) / d_in.
    """

    threshold: float = 0.3
    name = "null_space"

    def check(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"The null space's threshold must be a share > 0, got {self.threshold!r}.")

    def solution(self, memory: EditMemory, module: str, task: Task) -> RunningSolution:
        penalties = replace(task.penalties, preservation_weight=0.0, null_space=self.threshold)
        return memory.solution(module, penalties, task.shape, task.device, task.store)


@dataclass(frozen=True)
class Restrained(Update):
    """The ridge solution with its largest singular values restrained (PRUNE, arXiv 2405.16821).

    A singular value σ above the largest of W0, s, becomes `min(σ, s + log_base(σ / s))`.

    Args:
        base (`float`): Base of the logarithm, > 1; the larger, the harder the restraint.
    """

    base: float = 1.2
    name = "restrained"

    def check(self) -> None:
        if not self.base > 1:
            raise ValueError(f"The base of the restraint's logarithm must be > 1, got {self.base!r}.")

    def solution(self, memory: EditMemory, module: str, task: Task) -> RestrainedSolution:
        running = memory.solution(module, task.penalties, task.shape, task.device, task.store)
        weight = task.base_weight().to(task.device, task.dtype)
        largest = float(torch.linalg.eigvalsh(weight @ weight.T)[-1].clamp_min(0).sqrt())
        return RestrainedSolution(running, largest, self.base)


@dataclass(frozen=True, eq=False)
class RestrainedSolution:
    """A running solution seen through the restraint.

    Args:
        running (`RunningSolution`): Of all pairs.
        largest (`float`): Largest singular value of W0.
        base (`float`): Base of the logarithm.
    """

    running: RunningSolution
    largest: float
    base: float

    @cached_property
    def delta(self) -> torch.Tensor:
        """(d_out, d_in), restrained."""
        return restrained(self.running.delta, self.largest, self.base)

    @property
    def kept(self) -> Any:
        """The running solution."""
        return self.running

    def add(
        self, keys: torch.Tensor, values: torch.Tensor, rounds: int = 0, unmet: Unmet | None = None
    ) -> tuple[RestrainedSolution, torch.Tensor]:
        """As `RunningSolution.add`; a pair is unmet under the restrained delta."""

        def unmet_restrained(delta: torch.Tensor) -> torch.Tensor:
            assert unmet is not None
            return unmet(restrained(delta, self.largest, self.base))

        running, values = self.running.add(keys, values, rounds, None if unmet is None else unmet_restrained)
        return replace(self, running=running), values


def restrained(delta: torch.Tensor, largest: float, base: float) -> torch.Tensor:
    """The matrix with singular values above `largest` drawn towards it."""
    if float(torch.linalg.matrix_norm(delta, ord="fro")) <= largest:  # then none is above
        return delta
    squares, left = torch.linalg.eigh(delta @ delta.T)  # far cheaper than all singular vectors
    above = squares > largest**2
    left, values = left[:, above], squares[above].sqrt()
    logarithm = torch.log(values / largest) / math.log(base)
    change = torch.minimum(values, largest + logarithm) / values - 1
    return delta + (left * change) @ (left.T @ delta)
