"""Update rules against the published equations, written out plainly in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_edit.memory import EditMemory
from peft_edit.running import Penalties
from peft_edit.statistics import KeyStatistics
from peft_edit.updates import UPDATES, make_update
from peft_edit.updates.base import Task
from peft_edit.updates.folded import FoldedSolution, largest_changes
from peft_edit.updates.ridge import restrained


D_IN, D_OUT = 12, 7
PRESERVATION, PENALTY = 2.0, 0.3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed=9, count=60):
    keys = normal(count, D_IN, seed=seed) * torch.linspace(0.05, 2.0, D_IN, dtype=torch.float64)
    return keys.T @ keys / count


def batches(count=3, size=4):
    return [(normal(size, D_IN, seed=10 + i), normal(size, D_OUT, seed=50 + i)) for i in range(count)]


def task(max_norm=None, preservation=PRESERVATION, penalty=PENALTY):
    cpu = torch.device("cpu")
    penalties = Penalties(covariance(), preservation, penalty, max_norm)
    return Task(penalties, lambda: normal(D_OUT, D_IN, seed=99), D_OUT, cpu, cpu, torch.float64)


def memory(pairs=()):
    statistics = KeyStatistics({"m": covariance()}, 60, "test", {})
    return EditMemory(statistics, pairs={"m": tuple(pairs)} if pairs else {})


def solved(name, pairs, settings=None, **options):
    """The delta after the batches, one `add` each."""
    solution = make_update(name, settings).solution(memory(), "m", task(**options))
    for keys, values in pairs:
        solution, stored = solution.add(keys, values)
        assert torch.equal(stored, values)
    return solution.delta


def published_memit(pairs, past=True):
    """R Kᵀ (λC + KₚKₚᵀ + KKᵀ)⁻¹ added batch by batch, K with one key a column (arXiv 2210.07229, eq. 14)."""
    delta, gram = torch.zeros(D_OUT, D_IN, dtype=torch.float64), torch.zeros(D_IN, D_IN, dtype=torch.float64)
    base = PRESERVATION * covariance() + PENALTY * torch.eye(D_IN, dtype=torch.float64)
    for keys, values in pairs:
        columns = keys.T
        residual = values.T - delta @ columns
        system = base + columns @ columns.T + (gram if past else 0)
        delta = delta + residual @ columns.T @ torch.linalg.inv(system)
        gram = gram + columns @ columns.T
    return delta


def close(found, expected, tolerance=1e-9):
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


def test_ridge_is_memit_with_past_keys():
    assert close(solved("ridge", batches()), published_memit(batches()))


def test_forgetful_is_memit_as_published():
    found = solved("forgetful", batches())
    assert close(found, published_memit(batches(), past=False))
    assert not close(found, published_memit(batches()), 1e-2)


def test_constrained_is_emmet():
    """Δ = R (KᵀC⁻¹K)⁻¹ KᵀC⁻¹ (arXiv 2403.14236)."""
    inverse = torch.linalg.inv(PRESERVATION * covariance() + PENALTY * torch.eye(D_IN, dtype=torch.float64))
    delta = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for keys, values in batches():
        columns = keys.T
        residual = values.T - delta @ columns
        delta = delta + residual @ torch.linalg.inv(columns.T @ inverse @ columns) @ columns.T @ inverse
        assert close(delta @ columns, values.T)
    assert close(solved("constrained", batches()), delta)


def test_rank_one_is_rome():
    """W ← W + Λ (C⁻¹k)ᵀ with Λ = (v − W k) / (C⁻¹k)ᵀk, fact by fact (arXiv 2202.05262, eq. 2)."""
    delta = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    system = PRESERVATION * covariance() + PENALTY * torch.eye(D_IN, dtype=torch.float64)
    for keys, values in batches():
        for key, value in zip(keys, values):
            direction = torch.linalg.solve(system, key)
            delta = delta + torch.outer((value - delta @ key) / (direction @ key), direction)
    assert close(solved("rank_one", batches()), delta)


def test_null_space_is_alphaedit():
    """R KᵀP (P (KₚKₚᵀ + KKᵀ) P + L2 I)⁻¹ added batch by batch (arXiv 2410.02355)."""
    values, vectors = torch.linalg.eigh(covariance())
    weak = vectors[:, values <= 0.5 * values.mean()]
    assert 0 < weak.shape[1] < D_IN
    projector = weak @ weak.T
    delta, gram = torch.zeros(D_OUT, D_IN, dtype=torch.float64), torch.zeros(D_IN, D_IN, dtype=torch.float64)
    for keys, wanted in batches():
        columns = keys.T
        residual = wanted.T - delta @ columns
        system = projector @ (gram + columns @ columns.T) + PENALTY * torch.eye(D_IN, dtype=torch.float64)
        delta = delta + torch.linalg.solve(system, projector @ columns @ residual.T).T
        gram = gram + columns @ columns.T
    found = solved("null_space", batches(), {"threshold": 0.5})
    assert close(found, delta)
    assert float((found @ (torch.eye(D_IN, dtype=torch.float64) - projector)).norm()) < 1e-9


def test_sparse_is_rect():
    delta, gram = torch.zeros(D_OUT, D_IN, dtype=torch.float64), torch.zeros(D_IN, D_IN, dtype=torch.float64)
    weight = normal(D_OUT, D_IN, seed=99)
    base = PRESERVATION * covariance() + PENALTY * torch.eye(D_IN, dtype=torch.float64)
    for keys, values in batches():
        gram = gram + keys.T @ keys
        change = (values.T - delta @ keys.T) @ keys @ torch.linalg.inv(base + gram)
        relative = (change / (weight + delta)).abs()
        kept = relative.flatten().sort(descending=True).values[round(0.25 * change.numel()) - 1]
        delta = delta + change * (relative >= kept)
    assert close(solved("sparse", batches(), {"share": 0.25}), delta)


def test_largest_changes_by_hand():
    change = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    weight = torch.tensor([[1.0, 10.0], [1.0, 0.1]])  # relative: 1, 0.2, 3, 5
    assert largest_changes(change, weight, 0.5).tolist() == [[0.0, 0.0], [3.0, 0.5]]
    assert torch.equal(largest_changes(change, weight, 1.0), change)


def test_restrained_is_prune():
    """Singular values above W0's largest, s, become s + log_base(σ / s), where that is less (arXiv 2405.16821)."""
    delta = 40 * published_memit(batches())
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    assert values[0] > 8 > values[-1]
    expected = [min(v, 8 + float(torch.log(v / 8)) / 0.6931471805599453) if v > 8 else float(v) for v in values]
    found = restrained(delta, 8.0, 2.0)
    assert torch.linalg.svdvals(found).tolist() == pytest.approx(expected)
    assert close(found, left @ torch.diag(torch.tensor(expected, dtype=torch.float64)) @ right)
    assert torch.equal(restrained(delta, 1e6, 2.0), delta)


def test_restrained_solution_sees_the_base_weight():
    largest = float(torch.linalg.svdvals(normal(D_OUT, D_IN, seed=99))[0])
    pairs = [(keys, 100 * values) for keys, values in batches()]
    assert close(solved("restrained", pairs), restrained(published_memit(pairs), largest, 1.2), 1e-6)


@pytest.mark.parametrize("name", sorted(UPDATES))
def test_a_rule_gives_the_same_from_memory(name):
    pairs = batches()
    again = make_update(name).solution(memory(pairs), "m", task()).delta
    assert close(solved(name, pairs), again)


@pytest.mark.parametrize("name", sorted(UPDATES))
@given(budget=st.floats(0.01, 3.0))
def test_no_rule_exceeds_the_budget(name, budget):
    assert float(solved(name, batches(), max_norm=budget).norm()) <= budget * (1 + 1e-9)


def test_equality_constraints_that_contradict_each_other():
    keys, values = normal(2, D_IN), normal(2, D_OUT, seed=1)
    with pytest.raises(ValueError, match="linearly dependent"):
        solved("constrained", [(torch.cat([keys, keys[:1]]), torch.cat([values, values[1:]]))])


def test_a_folded_rule_does_not_refine():
    empty = make_update("forgetful").solution(memory(), "m", task())
    assert isinstance(empty, FoldedSolution)
    with pytest.raises(ValueError, match="refinements=0"):
        empty.add(*batches()[0], rounds=2)


@pytest.mark.parametrize(
    "name, settings, said",
    [
        ("nonsense", {}, "no update 'nonsense'"),
        ("ridge", {"share": 1}, "no setting 'share'"),
        ("sparse", {"share": 0}, r"in \(0, 1\]"),
        ("sparse", {"share": "half"}, "must be a number"),
        ("restrained", {"base": 1.0}, "must be > 1"),
        ("null_space", {"threshold": 0}, "share > 0"),
    ],
)
def test_bad_settings_are_named(name, settings, said):
    with pytest.raises(ValueError, match=said):
        make_update(name, settings)
