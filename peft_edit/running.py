"""A solution that is kept up to date while pairs are added, at a cost that does not depend on how many it holds.

`A = λp C + KᵀK + λ I` is factorised now and then. Between, the pairs that have come since are held as a low-rank term:
with `A₀ = L Lᵀ` and `H = L⁻¹Kᵀ` of the pending keys, `A = L (I + H Hᵀ) Lᵀ`, and by the Woodbury identity a batch of k
pairs costs two triangular solves with k right sides and changes the delta by a matrix of rank k (recursive least
squares):

    Δ ← Δ + (V − K Δᵀ)ᵀ (I + K A⁻¹Kᵀ)⁻¹ K A⁻¹

A new factorisation, which also solves for the delta afresh, bounds the drift. It comes after `d_in / 4` pending pairs,
or at once where the norm budget binds (λ then depends on every pair).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .solve import NormalEquations, Solution, Unmet, factorised, refined_values, solve_delta, solve_dtype


PENDING_SHARE = 4  # a new factorisation after d_in / PENDING_SHARE pending pairs


@dataclass(frozen=True, eq=False)
class Penalties:
    """What the pairs are weighed against.

    Args:
        covariance (`torch.Tensor`): (d_in, d_in) second moment of the keys on ordinary text.
        preservation_weight (`float`): λp.
        norm_penalty (`float`): λn.
        max_norm (`float`, *optional*): Largest allowed ||Δ||_F.
        null_space (`float`, *optional*): Keys count only where ordinary keys are weak: on the eigenvectors of the
            covariance with at most this share of its mean eigenvalue.
    """

    covariance: torch.Tensor
    preservation_weight: float
    norm_penalty: float
    max_norm: float | None = None
    null_space: float | None = None

    @property
    def numbers(self) -> tuple[float, float, float | None, float | None]:
        """All but the covariance."""
        return self.preservation_weight, self.norm_penalty, self.max_norm, self.null_space

    @cached_property
    def projection(self) -> torch.Tensor:
        """(d_in, d_in), onto the null space; float64 (float32 on devices without it)."""
        assert self.null_space is not None
        values, vectors = torch.linalg.eigh(self.covariance.to(solve_dtype(self.covariance.device)))
        weak = vectors[:, values <= self.null_space * values.mean()]
        if not weak.shape[1]:
            raise ValueError(
                f"The statistics have no eigenvalue below {self.null_space} of their mean: raise the null space's "
                "threshold."
            )
        return weak @ weak.T

    def effective(self, keys: torch.Tensor) -> torch.Tensor:
        """What of the keys (k, d_in) counts: all, or their part in the null space."""
        return keys if self.null_space is None else keys @ self.projection.to(keys)

    def same_as(self, other: Penalties) -> bool:
        """Whether both ask for the same; the covariance is compared by identity."""
        return self.covariance is other.covariance and self.numbers == other.numbers

    def solve(self, equations: NormalEquations, start: float | None = None) -> Solution:
        """A fresh solution."""
        return solve_delta(
            equations, self.covariance, self.preservation_weight, self.norm_penalty, self.max_norm, start
        )


@dataclass(frozen=True, eq=False)
class RunningSolution:
    """The solution for all pairs so far. Never changed in place: adding gives a new one.

    Args:
        penalties (`Penalties`): What it was solved under.
        equations (`NormalEquations`): Of the pairs of the last factorisation; may lie on the CPU.
        sums (`tuple[int, ...]`): How many pairs the equations held after each product that was added to them; the last
            is their count now. (Sums of other parts would differ in their last bits.)
        factor (`torch.Tensor`, *optional*): (d_in, d_in), L, at `norm_penalty`; None before the first pair.
        delta (`torch.Tensor`): (d_out, d_in), with the pending pairs.
        norm_penalty (`float`): λ in force.
        pending (`tuple`): (effective keys, values) of each batch since, in the solver's dtype.
        half (`torch.Tensor`): (d_in, m), H of the pending keys.
        inner (`torch.Tensor`): (m, m), lower Cholesky factor of `I + HᵀH`.
    """

    penalties: Penalties
    equations: NormalEquations
    sums: tuple[int, ...]
    factor: torch.Tensor | None
    delta: torch.Tensor
    norm_penalty: float
    pending: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    half: torch.Tensor
    inner: torch.Tensor

    # --- making one --------------------------------------------------------------------------------------------

    @classmethod
    def solved(
        cls,
        equations: NormalEquations,
        sums: tuple[int, ...],
        penalties: Penalties,
        start: float | None = None,
        store: torch.device | None = None,
    ) -> RunningSolution:
        """A fresh solution.

        Args:
            equations (`NormalEquations`): Of all pairs, on the device to solve on.
            sums (`tuple[int, ...]`): How they were summed.
            penalties (`Penalties`): What to solve under.
            start (`float`, *optional*): Where to begin the search for λ if the budget binds.
            store (`torch.device`, *optional*): Where to keep the equations meanwhile.
        """
        solution = penalties.solve(equations, start)
        return cls._fresh(equations, sums, penalties, solution, store)

    @classmethod
    def resumed(
        cls,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        sums: tuple[int, ...],
        norm_penalty: float,
        penalties: Penalties,
        empty: NormalEquations,
        store: torch.device | None = None,
    ) -> RunningSolution:
        """The very solution, to the last bit, that batches led to whose equations were summed in these parts.

        Args:
            batches: (keys, values) of every batch, oldest first.
            sums (`tuple[int, ...]`): As in the solution; each a sum of batch sizes.
            norm_penalty (`float`): λ in force.
            penalties (`Penalties`): What it was solved under.
            empty (`NormalEquations`): Zeros, on the device and in the dtype to solve in.
            store (`torch.device`, *optional*): Where to keep the equations meanwhile.

        Raises:
            ValueError: if no batch ends at one of `sums`.
        """
        pairs = ((penalties.effective(keys.to(empty.gram)), values.to(empty.gram)) for keys, values in batches)
        equations, count = empty, 0
        for end in sums:
            part = []
            while count < end and (batch := next(pairs, None)) is not None:
                part.append(batch)
                count += len(batch[0])
            if count != end:
                raise ValueError(f"No batch ends at pair {end}.")
            equations = _with(equations, part)
        running = cls._refactored(equations, sums, norm_penalty, penalties, store)
        for keys, values in pairs:
            running = running._with_pending(keys, values, _Update.of(running, keys))
        return running

    @classmethod
    def _refactored(
        cls,
        equations: NormalEquations,
        sums: tuple[int, ...],
        norm_penalty: float,
        penalties: Penalties,
        store: torch.device | None,
    ) -> RunningSolution:
        if not bool(equations.cross.any()):
            return cls._fresh(equations, sums, penalties, penalties.solve(equations), store)
        covariance = penalties.covariance.to(equations.gram)
        factor = factorised(torch.add(equations.gram, covariance, alpha=penalties.preservation_weight), norm_penalty)
        delta = torch.cholesky_solve(equations.cross.T, factor).T
        binding = norm_penalty > penalties.norm_penalty
        return cls._fresh(equations, sums, penalties, Solution(delta, 0.0, norm_penalty, binding, factor), store)

    @classmethod
    def _fresh(
        cls,
        equations: NormalEquations,
        sums: tuple[int, ...],
        penalties: Penalties,
        solution: Solution,
        store: torch.device | None,
    ) -> RunningSolution:
        gram = equations.gram
        return cls(
            penalties=penalties,
            equations=equations if store is None else equations.to(store),
            sums=sums,
            factor=solution.factor,
            delta=solution.delta,
            norm_penalty=solution.norm_penalty,
            pending=(),
            half=gram.new_zeros(len(gram), 0),
            inner=gram.new_zeros(0, 0),
        )

    # --- reading it --------------------------------------------------------------------------------------------

    @property
    def budget_binding(self) -> bool:
        """Whether the budget raised λ above λn."""
        return self.norm_penalty > self.penalties.norm_penalty

    @property
    def kept(self) -> RunningSolution:
        """What the edit memory keeps: itself."""
        return self

    @property
    def count(self) -> int:
        """Pairs in the solution."""
        return self.sums[-1] + sum(len(keys) for keys, _ in self.pending)

    def all_equations(self) -> NormalEquations:
        """The normal equations of all pairs, on the device of the delta."""
        return _with(self.equations.to(self.delta.device), self.pending)

    @property
    def all_sums(self) -> tuple[int, ...]:
        """How those are summed."""
        return (*self.sums, self.count) if self.pending else self.sums

    # --- adding to it ------------------------------------------------------------------------------------------

    def add(
        self, keys: torch.Tensor, values: torch.Tensor, rounds: int = 0, unmet: Unmet | None = None
    ) -> tuple[RunningSolution, torch.Tensor]:
        """The solution with k more pairs.

        Args:
            keys (`torch.Tensor`): (k, d_in).
            values (`torch.Tensor`): (k, d_out) wanted outputs.
            rounds (`int`): Rounds in which the values are refined (`refined_values`), unless the budget binds.
            unmet (*optional*): Given a delta, (d_out, d_in), tells which of the pairs need more, (k,) bool; by
                default all.

        Returns:
            The new solution, and the values that went into it: (k, d_out), rounded to the dtype of `values`.
        """
        wide_keys, wide_values = self.penalties.effective(keys.to(self.delta)), values.to(self.delta)
        room = len(self.delta.T) // PENDING_SHARE - self.half.shape[1]
        if self.factor is None or self.budget_binding or len(keys) > room:
            return self._add_afresh(wide_keys, values, rounds, unmet)
        update = _Update.of(self, wide_keys)
        if rounds:
            small, rest = update.inner_new, wide_values - wide_keys @ self.delta.T
            missing = torch.cholesky_solve(rest, small)
            hat = torch.eye(len(keys)).to(small) - torch.cholesky_inverse(small)
            spread = torch.cholesky_solve(update.solved.T, small)

            def unmet_with(refined: torch.Tensor) -> torch.Tensor:
                assert unmet is not None
                return unmet(self.delta + (refined - wide_values + rest).T @ spread)

            refined = refined_values(
                wide_values, wide_values - missing, hat, rounds, None if unmet is None else unmet_with
            )
            values = refined.to(values.dtype)
        running = self._with_pending(wide_keys, values.to(wide_keys), update)
        if self.penalties.max_norm is not None and float(running.delta.norm()) > self.penalties.max_norm:
            return self._add_afresh(wide_keys, values, 0)
        return running, values

    def _add_afresh(
        self, keys: torch.Tensor, values: torch.Tensor, rounds: int, unmet: Unmet | None = None
    ) -> tuple[RunningSolution, torch.Tensor]:
        known, sums = self.all_equations(), (*self.all_sums, self.count + len(keys))
        store = self.equations.gram.device
        start = self.norm_penalty if self.budget_binding else None
        equations = known.add(keys, values)
        solution = self.penalties.solve(equations, start)
        if rounds and not solution.budget_binding and solution.factor is not None:
            values = _refined_afresh(solution, keys, values.to(keys), rounds, unmet).to(values.dtype)
            del solution, equations  # room for the second solution
            equations = known.add(keys, values)
            solution = self.penalties.solve(equations)
        return self._fresh(equations, sums, self.penalties, solution, store), values

    def _with_pending(self, keys: torch.Tensor, values: torch.Tensor, update: _Update) -> RunningSolution:
        rest = values - keys @ self.delta.T
        delta = self.delta + torch.cholesky_solve(rest, update.inner_new).T @ update.solved.T
        return replace(
            self,
            delta=delta,
            pending=(*self.pending, (keys, values)),
            half=torch.cat([self.half, update.half], dim=1),
            inner=update.inner(self.inner),
        )


def _refined_afresh(
    solution: Solution, keys: torch.Tensor, values: torch.Tensor, rounds: int, unmet: Unmet | None
) -> torch.Tensor:
    """Refined values of the pairs (keys, values), which a fresh solution holds."""
    assert solution.factor is not None
    half = torch.linalg.solve_triangular(solution.factor, keys.T, upper=False)
    spread = torch.linalg.solve_triangular(solution.factor.T, half, upper=True).T

    def unmet_with(refined: torch.Tensor) -> torch.Tensor:
        assert unmet is not None
        return unmet(solution.delta + (refined - values).T @ spread)

    outputs = keys @ solution.delta.T
    return refined_values(values, outputs, half.T @ half, rounds, None if unmet is None else unmet_with)


def _with(equations: NormalEquations, part: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> NormalEquations:
    """With the pairs of some batches, added as one product."""
    if not part:
        return equations
    keys, values = (torch.cat(tensors) for tensors in zip(*part))
    return equations.add(keys, values)


@dataclass(frozen=True, eq=False)
class _Update:
    """k new keys against the system before them.

    Args:
        half (`torch.Tensor`): (d_in, k), `L⁻¹Kᵀ`.
        solved (`torch.Tensor`): (d_in, k), `A⁻¹Kᵀ`.
        corner (`torch.Tensor`): (m, k), `inner⁻¹ Hᵀ half`.
        inner_new (`torch.Tensor`): (k, k), lower Cholesky factor of `I + K A⁻¹Kᵀ`.
    """

    half: torch.Tensor
    solved: torch.Tensor
    corner: torch.Tensor
    inner_new: torch.Tensor

    @classmethod
    def of(cls, running: RunningSolution, keys: torch.Tensor) -> _Update:
        assert running.factor is not None
        half = torch.linalg.solve_triangular(running.factor, keys.T, upper=False)
        corner = torch.linalg.solve_triangular(running.inner, running.half.T @ half, upper=False)
        within = half - running.half @ torch.linalg.solve_triangular(running.inner.T, corner, upper=True)
        solved = torch.linalg.solve_triangular(running.factor.T, within, upper=True)
        small = half.T @ half - corner.T @ corner
        small.diagonal().add_(1.0)
        return cls(half, solved, corner, torch.linalg.cholesky(small))

    def inner(self, known: torch.Tensor) -> torch.Tensor:
        """The inner factor with the new keys: `I + HᵀH` grows by a border, and so does its Cholesky factor."""
        upper = torch.cat([known, known.new_zeros(len(known), len(self.inner_new))], dim=1)
        return torch.cat([upper, torch.cat([self.corner.T, self.inner_new], dim=1)])
