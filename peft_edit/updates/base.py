"""What an update rule is: how the pairs of a module become its delta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from ..running import Penalties
from ..solve import Unmet, factorised


if TYPE_CHECKING:
    from ..memory import EditMemory


class ModuleSolution(Protocol):
    """A module's delta for the pairs so far. Never changed in place: adding gives a new one."""

    @property
    def delta(self) -> torch.Tensor:
        """(d_out, d_in), in the solver's dtype."""

    @property
    def kept(self) -> Any:
        """What the edit memory keeps of it until the next batch."""

    def add(
        self, keys: torch.Tensor, values: torch.Tensor, rounds: int = 0, unmet: Unmet | None = None
    ) -> tuple[ModuleSolution, torch.Tensor]:
        """The solution with k more pairs, (k, d_in) and (k, d_out), and the values that went into it.

        `rounds` and `unmet` are those of `RunningSolution.add`.
        """


@dataclass(frozen=True, eq=False)
class Task:
    """One module's problem.

    Args:
        penalties (`Penalties`): Covariance, λp, λn and the cap on the norm.
        base_weight: Gives W0, (d_out, d_in), when asked.
        d_out (`int`): Outputs of the module.
        device (`torch.device`): Where to solve.
        store (`torch.device`): Where to keep normal equations meanwhile.
        dtype (`torch.dtype`): What to solve in.
    """

    penalties: Penalties
    base_weight: Callable[[], torch.Tensor]
    d_out: int
    device: torch.device
    store: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """d_in, d_out."""
        return self.penalties.covariance.shape[0], self.d_out

    def system(self) -> torch.Tensor:
        """(d_in, d_in), λp C + λn I."""
        system = self.penalties.covariance.to(self.device, self.dtype) * self.penalties.preservation_weight
        system.diagonal().add_(self.penalties.norm_penalty)
        return system

    @cached_property
    def system_factor(self) -> torch.Tensor:
        """Lower Cholesky factor of the system without any pair."""
        return factorised(self.system(), 0.0)


class Update(ABC):
    """An update rule; a frozen dataclass whose fields are its settings.

    A rule is deterministic in the pairs and their batches, so what it gives can be made again from the edit memory:
    after loading, and without a fact that is taken out.
    """

    name: ClassVar[str]
    batch_size: ClassVar[int] = 100  # of `edit_facts`, where none is given
    # Whether a pair's value is no searched value but the gradient of the loss with respect to the module's output.
    from_gradients: ClassVar[bool] = False

    def check(self) -> None:  # noqa: B027 (a rule without settings has nothing to check)
        """Raises a ValueError if a setting is out of range."""

    @abstractmethod
    def solution(self, memory: EditMemory, module: str, task: Task) -> ModuleSolution:
        """A module's solution for all pairs of `memory`."""
