"""The solver against brute force, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_edit.solve import NormalEquations, auto_penalties, solve_delta


TOLERANCE = 1e-8


def problem(seed, d_in=12, d_out=7, n=9, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, values = scale * draw(n, d_in), draw(n, d_out)
    text = scale * draw(5 * d_in, d_in) * torch.logspace(-1, 1, d_in, dtype=torch.float64)
    return keys, values, text.T @ text / len(text)


def brute_force(keys, values, covariance, preservation, penalty):
    """The stacked least-squares problem: data rows, a square root of λp C, and √λn I."""
    d_in, d_out = keys.shape[1], values.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    rows = torch.cat([keys, preservation**0.5 * root, penalty**0.5 * torch.eye(d_in, dtype=torch.float64)])
    wanted = torch.cat([values, torch.zeros(2 * d_in, d_out, dtype=torch.float64)])
    return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T


def relative(one, other):
    return float((one - other).norm() / other.norm())


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    preservation=st.floats(0.01, 100),
    penalty=st.floats(1e-3, 10),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_solution_is_the_least_squares_minimum(seed, n, preservation, penalty, scale):
    keys, values, covariance = problem(seed, n=n, scale=scale)
    solution = solve_delta(NormalEquations.from_pairs(keys, values), covariance, preservation, penalty)
    assert relative(solution.delta, brute_force(keys, values, covariance, preservation, penalty)) < TOLERANCE
    assert not solution.budget_binding and solution.norm_penalty == penalty
    assert solution.norm == pytest.approx(float(solution.delta.norm()), rel=1e-12)


@given(seed=st.integers(0, 10**6), operations=st.lists(st.integers(1, 4), min_size=1, max_size=60))
@settings(derandomize=True, max_examples=30, deadline=None)
def test_updates_and_downdates_equal_building_from_scratch(seed, operations):
    keys, values, covariance = problem(seed, n=200)
    equations = NormalEquations.empty(12, 7)
    held: list[list[int]] = []
    fresh = iter(range(200))
    for step, count in enumerate(operations):
        if step % 3 == 2:
            gone = held.pop(len(held) // 2)
            equations = equations.remove(keys[gone], values[gone])
        else:
            held.append([next(fresh) for _ in range(count)])
            equations = equations.add(keys[held[-1]], values[held[-1]])
    rows = [row for batch in held for row in batch]
    scratch = NormalEquations.from_pairs(keys[rows], values[rows])
    one, other = (solve_delta(item, covariance, 1.0, 0.1).delta for item in (equations, scratch))
    assert relative(one, other) < TOLERANCE


@given(seed=st.integers(0, 10**6), share=st.floats(1e-4, 0.999), penalty=st.sampled_from([0.0, 1e-3, 1.0]))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_budget_is_met_by_the_smallest_penalty(seed, share, penalty):
    keys, values, covariance = problem(seed)
    equations = NormalEquations.from_pairs(keys, values)
    free = solve_delta(equations, covariance, 1.0, penalty)
    budget = share * free.norm
    bound = solve_delta(equations, covariance, 1.0, penalty, max_norm=budget)
    assert bound.budget_binding and bound.norm_penalty > penalty
    assert bound.norm <= budget * (1 + 1e-9)
    assert bound.norm == pytest.approx(budget, rel=1e-6)
    # It solves the ridge problem of that penalty, so it is not rescaled, and a smaller penalty exceeds the budget.
    assert relative(bound.delta, brute_force(keys, values, covariance, 1.0, bound.norm_penalty)) < TOLERANCE
    looser = penalty + (bound.norm_penalty - penalty) * (1 - 1e-5)
    assert solve_delta(equations, covariance, 1.0, looser).norm > budget
    # Convex problem: no other feasible delta does better.
    generator = torch.Generator().manual_seed(seed)

    def objective(delta):
        return float(
            ((keys @ delta.T - values) ** 2).sum() + (delta @ covariance * delta).sum() + penalty * (delta**2).sum()
        )

    for _ in range(5):
        other = bound.delta + 0.1 * bound.norm * torch.randn(
            bound.delta.shape, generator=generator, dtype=torch.float64
        )
        other *= min(1.0, budget / float(other.norm()))
        assert objective(other) >= objective(bound.delta)


def test_a_budget_that_does_not_bind_changes_nothing():
    keys, values, covariance = problem(3)
    equations = NormalEquations.from_pairs(keys, values)
    free = solve_delta(equations, covariance, 1.0, 0.5)
    loose = solve_delta(equations, covariance, 1.0, 0.5, max_norm=2 * free.norm)
    assert torch.equal(free.delta, loose.delta) and not loose.budget_binding


def test_no_pairs_give_exactly_zero():
    solution = solve_delta(NormalEquations.empty(5, 4), torch.eye(5, dtype=torch.float64), 0.0, 0.0, max_norm=1.0)
    assert not solution.delta.any() and solution.norm == 0.0


def test_singular_systems_and_bad_numbers_are_refused():
    keys, values, covariance = problem(1, n=3)
    equations = NormalEquations.from_pairs(keys, values)
    with pytest.raises(ValueError, match="Raise norm_penalty"):
        solve_delta(equations, torch.zeros_like(covariance), 1.0, 0.0)
    with pytest.raises(ValueError, match="statistics hold values"):
        solve_delta(equations, covariance * torch.nan, 1.0, 1.0)
    with pytest.raises(ValueError, match="max_norm=0"):
        solve_delta(equations, covariance, 1.0, 1.0, max_norm=0)
    with pytest.raises(ValueError, match="do not fit"):
        equations.add(torch.zeros(2, 5), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="must be"):
        NormalEquations.from_pairs(torch.zeros(2, 5), torch.zeros(3, 7))


def test_auto_penalties_scale_with_the_model():
    covariance = 3.0 * torch.eye(1024, dtype=torch.float64)
    preservation, penalty = auto_penalties(covariance, "auto", "auto")
    twice = auto_penalties(2 * covariance, "auto", "auto")
    assert preservation == twice[0] and twice[1] == pytest.approx(2 * penalty)
    assert auto_penalties(covariance, 15000, 20) == (15000.0, 20.0)
    # The published λp at the published width is of the size that "auto" gives there.
    assert 0.3 < auto_penalties(torch.eye(14336), "auto", 0.0)[0] / 15000 < 3
