"""The update as linear algebra: normal equations, their solution, and the norm constraint. Tensors in, tensors out.

With keys `K` (n × d_in), values `V` (n × d_out), the keys' second moment `C` (d_in × d_in) and weights λp, λn, the
cumulative delta minimises

    ||Δ Kᵀ − Vᵀ||_F² + λp tr(Δ C Δᵀ) + λn ||Δ||_F²     subject to ||Δ||_F ≤ budget

(arXiv 2502.01636, eq. 7, on the cumulative delta; with λn = 0 and no budget MEMIT's, arXiv 2210.07229, eq. 14), so
`Δ(λ) = B (λp C + KᵀK + λ I)⁻¹` with `B = VᵀK`, and λ the smallest value ≥ λn that meets the budget.

`running.py` keeps a solution up to date while pairs are added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


Unmet = Callable[[torch.Tensor], torch.Tensor]

# "auto" in units of the model. λp: d_in / (λp + d_in) of a wanted value is written by one layer for a typical key; the
# paper's 15000 at d_in 14336 is 1.05 d_in. λn: a share of λp's mean eigenvalue, λp tr(C) / d_in.
PRESERVATION_PER_INPUT = 1.0
NORM_PENALTY_SHARE = 0.01

BUDGET_TOLERANCE = 1e-10  # relative, of the norm against the budget
_MAX_ITERATIONS = 100


@dataclass(frozen=True)
class NormalEquations:
    """What the pairs contribute to the normal equations; sums, so batches add and remove exactly.

    Args:
        gram (`torch.Tensor`): (d_in, d_in), the sum of k kᵀ.
        cross (`torch.Tensor`): (d_out, d_in), the sum of v kᵀ.
    """

    gram: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def empty(
        cls, d_in: int, d_out: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> NormalEquations:
        """No pairs."""
        return cls(
            torch.zeros(d_in, d_in, device=device, dtype=dtype), torch.zeros(d_out, d_in, device=device, dtype=dtype)
        )

    @classmethod
    def from_pairs(cls, keys: torch.Tensor, values: torch.Tensor) -> NormalEquations:
        """The pairs' own equations, in their dtype. `keys` (n, d_in), `values` (n, d_out)."""
        _check_pairs(keys, values)
        return cls(keys.T @ keys, values.T @ keys)

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> NormalEquations:
        """With n more pairs (update)."""
        keys, values = self._matching(keys, values)
        return NormalEquations(torch.addmm(self.gram, keys.T, keys), torch.addmm(self.cross, values.T, keys))

    def remove(self, keys: torch.Tensor, values: torch.Tensor) -> NormalEquations:
        """Without n pairs that were added before (downdate)."""
        keys, values = self._matching(keys, values)
        return NormalEquations(
            torch.addmm(self.gram, keys.T, keys, alpha=-1), torch.addmm(self.cross, values.T, keys, alpha=-1)
        )

    def to(self, device: torch.device | str) -> NormalEquations:
        """The same on another device."""
        return NormalEquations(self.gram.to(device), self.cross.to(device))

    def _matching(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs in the equations' dtype, on their device."""
        _check_pairs(keys, values)
        if (values.shape[1], keys.shape[1]) != self.cross.shape:
            raise ValueError(
                f"Pairs of width {keys.shape[1]} -> {values.shape[1]} do not fit equations of width "
                f"{self.cross.shape[1]} -> {self.cross.shape[0]}."
            )
        return keys.to(self.gram), values.to(self.gram)


def _check_pairs(keys: torch.Tensor, values: torch.Tensor) -> None:
    if keys.dim() != 2 or values.dim() != 2 or len(keys) != len(values):
        raise ValueError(
            f"Keys and values must be (n, d_in) and (n, d_out), got {tuple(keys.shape)} and {tuple(values.shape)}."
        )


@dataclass(frozen=True)
class Solution:
    """A solved delta.

    Args:
        delta (`torch.Tensor`): (d_out, d_in).
        norm (`float`): ||Δ||_F.
        norm_penalty (`float`): λ in force, at least the λn asked for.
        budget_binding (`bool`): The budget raised λ above λn.
        factor (`torch.Tensor`, *optional*): (d_in, d_in) lower Cholesky factor of the system at that λ; None where
            there is nothing to solve for.
    """

    delta: torch.Tensor
    norm: float
    norm_penalty: float
    budget_binding: bool
    factor: torch.Tensor | None


def solve_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on devices without it (MPS)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def auto_penalties(
    covariance: torch.Tensor, preservation_weight: float | str, norm_penalty: float | str
) -> tuple[float, float]:
    """λp and λn as numbers: "auto" in units of the model, a number as it is.

    Args:
        covariance (`torch.Tensor`): (d_in, d_in) second moment of the keys.
        preservation_weight (`float` or `"auto"`): λp; "auto" is `PRESERVATION_PER_INPUT` · d_in.
        norm_penalty (`float` or `"auto"`): λn; "auto" is `NORM_PENALTY_SHARE` · λp · tr(C) / d_in.
    """
    d_in = covariance.shape[0]
    preservation = PRESERVATION_PER_INPUT * d_in if preservation_weight == "auto" else float(preservation_weight)
    if norm_penalty == "auto":
        return preservation, NORM_PENALTY_SHARE * preservation * float(covariance.diagonal().double().sum()) / d_in
    return preservation, float(norm_penalty)


def solve_delta(
    equations: NormalEquations,
    covariance: torch.Tensor,
    preservation_weight: float,
    norm_penalty: float,
    max_norm: float | None = None,
    start: float | None = None,
) -> Solution:
    """Solves for the cumulative delta.

    Args:
        equations (`NormalEquations`): Of all pairs, float64 (float32 where there is none).
        covariance (`torch.Tensor`): (d_in, d_in) second moment of the keys on ordinary text.
        preservation_weight (`float`): λp ≥ 0.
        norm_penalty (`float`): λn ≥ 0.
        max_norm (`float`, *optional*): The largest allowed ||Δ||_F, > 0. Met by the smallest λ ≥ λn that satisfies it,
            found by Newton's method on 1 / ||Δ(λ)|| (Moré & Sorensen, 1983), which approaches it from below without
            overshooting (one step from above leads below) and ends within 1e-10 relative.
        start (`float`, *optional*): Where to begin the search for λ, such as the λ of a system a little smaller.

    Returns:
        `Solution`

    Raises:
        ValueError: if something is not finite, a weight is negative, or the system is singular.
    """
    gram, cross = equations.gram, equations.cross
    for name, tensor in (("keys", gram), ("values", cross), ("statistics", covariance)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"The {name} hold values that are not finite numbers; nothing was solved.")
    if preservation_weight < 0 or norm_penalty < 0 or (max_norm is not None and not max_norm > 0):
        raise ValueError(
            f"Weights must be >= 0 and a norm budget > 0, got preservation_weight={preservation_weight}, "
            f"norm_penalty={norm_penalty}, max_norm={max_norm}."
        )
    if not bool(cross.any()):
        return Solution(torch.zeros_like(cross), 0.0, norm_penalty, False, None)
    system = torch.add(gram, covariance.to(gram), alpha=preservation_weight)
    floor = norm_penalty
    penalty = floor if start is None or max_norm is None else max(floor, start)
    for _ in range(_MAX_ITERATIONS):
        factor = factorised(system, penalty)
        delta = torch.cholesky_solve(cross.T, factor).T
        norm = float(delta.norm())
        if max_norm is None or (norm <= max_norm and penalty == floor):
            break
        if abs(norm / max_norm - 1) <= BUDGET_TOLERANCE:
            break
        # d||Δ||²/dλ = −2 tr(Δ A⁻¹ Δᵀ) = −2 ||L⁻¹ Δᵀ||²
        half_slope = float(torch.linalg.solve_triangular(factor, delta.T, upper=False).square().sum())
        penalty = max(floor, penalty + (norm / max_norm - 1) * norm**2 / half_slope) if norm > 0 else floor
    return Solution(delta, norm, penalty, penalty > floor, factor)


def refined_values(
    values: torch.Tensor, outputs: torch.Tensor, hat: torch.Tensor, rounds: int, unmet: Unmet | None = None
) -> torch.Tensor:
    """Values for new pairs that bring the solved outputs closer to the wanted ones.

    A ridge solution writes only a part of each value: `Δ k = v − r`. Adding what is missing to the values and solving
    again writes more of it, `r ← (I − H) r` a round with the hat matrix `H = K (λp C + KᵀK + λ I)⁻¹ Kᵀ` of the new
    keys (iterated Tikhonov regularisation). Values that point where ordinary keys leave room are met within a round or
    two; those in the way of ordinary text stay behind, which a smaller λp would not give. All rounds are done on H.

    More than is needed need not be written: in each round only the values that are `unmet` are raised.

    Args:
        values (`torch.Tensor`): (n, d_out) wanted outputs.
        outputs (`torch.Tensor`): (n, d_out) what the solution gives there, `K Δᵀ`.
        hat (`torch.Tensor`): (n, n), H, of the system that includes the pairs.
        rounds (`int`): Rounds at most, >= 0.
        unmet (*optional*): Given the values so far, (n, d_out), tells which pairs need more, (n,) bool; by default
            all.

    Returns:
        `torch.Tensor`: (n, d_out).
    """
    missing = values - outputs
    for _ in range(rounds):
        step = missing
        if unmet is not None:
            needed = unmet(values)
            if not bool(needed.any()):
                break
            step = torch.where(needed[:, None], missing, 0.0)
        values = values + step
        missing = missing - hat @ step
    return values


def factorised(system: torch.Tensor, penalty: float) -> torch.Tensor:
    """Lower Cholesky factor of `system + penalty · I`.

    Raises:
        ValueError: if the system is singular.
    """
    diagonal = system.diagonal().clone()
    system.diagonal().add_(penalty)  # for a moment: a copy of the system would be as large as all else
    largest = system.diagonal().abs().max()
    factor, info = torch.linalg.cholesky_ex(system)
    system.diagonal().copy_(diagonal)
    # A factor may exist through rounding alone; then its smallest pivot is rounding too.
    pivots = factor.diagonal().square()
    floor = 10 * torch.finfo(system.dtype).eps * largest
    if int(info) != 0 or bool((pivots <= floor).any()):
        raise ValueError(
            "The normal equations are singular: the keys and statistics leave directions of the weights undetermined. "
            "Raise norm_penalty above 0, or collect statistics from more text."
        )
    return factor
