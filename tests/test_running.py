"""The running solution: equal to a fresh solve whatever was added, resumed to the last bit, cheap in the past."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_edit.running import PENDING_SHARE, Penalties, RunningSolution
from peft_edit.solve import NormalEquations, solve_delta


D_IN, D_OUT = 48, 12


def covariance(generator) -> torch.Tensor:
    keys = torch.randn(400, D_IN, generator=generator, dtype=torch.float64)
    return keys.T @ keys / len(keys)


def batches(generator, sizes, dtype=torch.float64):
    return [
        (
            torch.randn(size, D_IN, generator=generator, dtype=dtype),
            0.3 * torch.randn(size, D_OUT, generator=generator, dtype=dtype),
        )
        for size in sizes
    ]


def start(penalties) -> RunningSolution:
    return RunningSolution.solved(NormalEquations.empty(D_IN, D_OUT), (0,), penalties)


def fresh(penalties, pairs):
    keys = torch.cat([keys for keys, _ in pairs]).double()
    values = torch.cat([values for _, values in pairs]).double()
    equations = NormalEquations.from_pairs(keys, values)
    numbers = (penalties.preservation_weight, penalties.norm_penalty, penalties.max_norm)
    return solve_delta(equations, penalties.covariance, *numbers)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 2 * D_IN // PENDING_SHARE), min_size=1, max_size=12),
    max_norm=st.sampled_from([None, 0.3, 1.0, 50.0]),
    seed=st.integers(0, 100),
)
def test_equals_a_fresh_solve(sizes, max_norm, seed):
    generator = torch.Generator().manual_seed(seed)
    penalties = Penalties(covariance(generator), 10.0, 0.1, max_norm)
    running, added = start(penalties), []
    for keys, values in batches(generator, sizes):
        running, values = running.add(keys, values)
        added.append((keys, values))
        expected = fresh(penalties, added)
        assert torch.allclose(running.delta, expected.delta, rtol=0, atol=1e-9 * max(expected.norm, 1e-3))
        assert running.budget_binding == expected.budget_binding
        assert running.norm_penalty == pytest.approx(expected.norm_penalty, rel=1e-6)
    assert running.count == sum(sizes)
    equations = running.all_equations()
    keys = torch.cat([keys for keys, _ in added])
    assert torch.allclose(equations.gram, keys.T @ keys, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rounds", [1, 4])
def test_refined_values_are_those_of_repeated_solves(rounds):
    generator = torch.Generator().manual_seed(1)
    penalties = Penalties(covariance(generator), 30.0, 0.1)
    [first, (keys, wanted)] = batches(generator, [5, 4])
    for known in (start(penalties), start(penalties).add(*first)[0]):
        running, values = known.add(keys, wanted, rounds)
        pairs = [first] if known.count else []
        expected = wanted
        for _ in range(rounds):  # the definition: what is missing is added to the values, and all is solved again
            missing = wanted - keys @ fresh(penalties, [*pairs, (keys, expected)]).delta.T
            expected = expected + missing
        assert torch.allclose(values, expected, rtol=0, atol=1e-10)
        assert torch.allclose(running.delta, fresh(penalties, [*pairs, (keys, values)]).delta, rtol=0, atol=1e-11)


def test_only_what_is_unmet_is_refined():
    generator = torch.Generator().manual_seed(1)
    penalties = Penalties(covariance(generator), 30.0, 0.1)
    [first, (keys, wanted)] = batches(generator, [5, 4])
    answers = [torch.tensor(flags) for flags in ([True, True, False, True], [True, False, False, True], [False] * 4)]
    for known in (start(penalties), start(penalties).add(*first)[0]):
        pairs, asked = [first] if known.count else [], []

        def unmet(delta, asked=asked):
            asked.append(delta)
            return answers[len(asked) - 1]

        running, values = known.add(keys, wanted, 4, unmet)
        assert len(asked) == 3  # nothing is unmet the third time
        expected = wanted
        for delta, needed in zip(asked, answers):
            solved = fresh(penalties, [*pairs, (keys, expected)]).delta
            assert torch.allclose(delta, solved, rtol=0, atol=1e-11)
            expected = expected + torch.where(needed[:, None], wanted - keys @ solved.T, 0.0)
        assert torch.allclose(values, expected, rtol=0, atol=1e-10)
        assert torch.allclose(running.delta, fresh(penalties, [*pairs, (keys, values)]).delta, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [None, 0.6])
def test_resumes_to_the_last_bit(dtype, max_norm):
    generator = torch.Generator().manual_seed(2)
    penalties = Penalties(covariance(generator), 10.0, 0.1, max_norm)
    running, added = start(penalties), []
    for keys, values in batches(generator, [3, 4, 7, 2, 5, 1, 3, 40, 2, 2], dtype):
        running, values = running.add(keys, values, rounds=2)
        added.append((keys, values))
        empty = NormalEquations.empty(D_IN, D_OUT)
        resumed = RunningSolution.resumed(added, running.sums, running.norm_penalty, penalties, empty)
        assert torch.equal(resumed.delta, running.delta)
        assert resumed.norm_penalty == running.norm_penalty and resumed.count == running.count
    assert running.sums[-1] != running.count or max_norm is not None
    with pytest.raises(ValueError, match="No batch ends at pair 4"):
        RunningSolution.resumed(added, (4,), 0.1, penalties, NormalEquations.empty(D_IN, D_OUT))


def test_drift_over_ten_thousand_single_edits():
    generator = torch.Generator().manual_seed(3)
    penalties = Penalties(covariance(generator), 10.0, 0.01)
    running, added = start(penalties), batches(generator, [1] * 10_000)
    worst = 0.0
    for index, (keys, values) in enumerate(added, start=1):
        running, _ = running.add(keys, values)
        if index % 997 == 0 or index == len(added):
            expected = fresh(penalties, added[:index])
            worst = max(worst, float((running.delta - expected.delta).norm()) / expected.norm)
    assert worst <= 1e-10
    assert running.half.shape[1] <= D_IN // PENDING_SHARE


def test_adding_leaves_the_old_solution_as_it_was():
    generator = torch.Generator().manual_seed(4)
    penalties = Penalties(covariance(generator), 10.0, 0.1)
    first, second, third = batches(generator, [2, 3, 3])
    running, _ = start(penalties).add(*first)
    delta = running.delta.clone()
    one, _ = running.add(*second)
    other, _ = running.add(*third)
    assert torch.equal(running.delta, delta) and running.count == 2
    assert torch.allclose(one.delta, fresh(penalties, [first, second]).delta, rtol=0, atol=1e-11)
    assert torch.allclose(other.delta, fresh(penalties, [first, third]).delta, rtol=0, atol=1e-11)
