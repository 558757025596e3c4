"""Bootstrap intervals of scores: against a plain loop, their coverage, paired differences."""

import math

import numpy as np
import pytest

from peft_edit.evaluation import bootstrap
from peft_edit.evaluation.bootstrap import (
    estimate_differences,
    estimates,
    group_means,
    harmonic_mean,
    percentile_interval,
    resample_indices,
    resampled_means,
)

from .plain_scores import KINDS, NAN


def test_means_of_groups_and_harmonic_means_by_hand():
    assert group_means([1, 3, 10], [0, 0, 2], 4).tolist() == pytest.approx([2, NAN, 10, NAN], nan_ok=True)
    assert group_means([], [], 2).tolist() == pytest.approx([NAN, NAN], nan_ok=True)
    means = harmonic_mean([[100, 100, 50], [40, 0, 80], [40, NAN, 0]])
    assert means.tolist() == pytest.approx([75, 0, NAN], nan_ok=True)


@pytest.mark.parametrize("block", [None, 20])
def test_bootstrap_is_what_a_plain_loop_gives(monkeypatch, block):
    if block:  # draws come in several blocks
        monkeypatch.setattr(bootstrap, "_BLOCK_ENTRIES", block)
    table = {
        "efficacy": [100.0, 0.0, 100.0, 50.0, 100.0, 0.0],
        "paraphrase": [50.0, NAN, NAN, 100.0, NAN, NAN],
        "neighborhood": [0.0, 10.0, 60.0, NAN, 90.0, 100.0],
    }
    indices = resample_indices(6, 200, seed=3)
    assert indices.shape == (200, 6) and set(indices.ravel()) == set(range(6))
    assert (indices == resample_indices(6, 200, seed=3)).all() and (indices != resample_indices(6, 200, seed=4)).any()
    expected = {**{name: [] for name in table}, "score": []}
    for row in indices:
        means = []
        for name, values in table.items():
            drawn = [values[place] for place in row if not math.isnan(values[place])]
            means.append(sum(drawn) / len(drawn) if drawn else NAN)
            expected[name].append(means[-1])
        if any(math.isnan(mean) for mean in means):
            expected["score"].append(NAN)
        else:
            expected["score"].append(0.0 if 0 in means else 3 / sum(1 / mean for mean in means))
    found = resampled_means(np.stack(list(table.values()), axis=1), 200, seed=3)
    for column, name in enumerate(table):
        assert found[:, column].tolist() == pytest.approx(expected[name], nan_ok=True)
    assert np.isnan(expected["paraphrase"]).any()
    found = estimates(table, KINDS, confidence=0.8, resamples=200, seed=3)
    for name, samples in expected.items():
        samples = sorted(sample for sample in samples if not math.isnan(sample))
        for end, share in ((found[name].low, 0.1), (found[name].high, 0.9)):
            place = share * (len(samples) - 1)
            below, above = samples[math.floor(place)], samples[math.ceil(place)]
            assert end == pytest.approx(below + (place - math.floor(place)) * (above - below))
    assert found["paraphrase"].value == pytest.approx(75)
    assert found["score"].value == pytest.approx(3 / (6 / 350 + 1 / 75 + 5 / 260))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        values = 100.0 * (generator.random(80) < 0.7)
        low, high = percentile_interval(resampled_means(values[:, None], 300, seed=trial)[:, 0], 0.9)
        covered += low <= 70.0 <= high
    assert 0.84 <= covered / 300 <= 0.95


def test_paired_differences_are_narrower_than_the_scores_apart():
    first = {"efficacy": [float(value) for value in range(0, 100, 2)]}
    second = {"efficacy": [value - 5.0 for value in first["efficacy"]]}
    assert estimate_differences(first, second)["efficacy"] == pytest.approx((5.0, 5.0, 5.0))
    apart = estimates(first)["efficacy"]
    assert apart.high - apart.low > 10
    with pytest.raises(ValueError, match="same facts can be compared"):
        estimate_differences(first, {"efficacy": [1.0]})


def test_bootstrap_errors_say_what_to_do():
    with pytest.raises(ValueError, match="no facts to resample"):
        resampled_means(np.zeros((0, 1)))
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        resampled_means(np.zeros((2, 1)), resamples=0)
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, such as 0.95, got 95"):
        percentile_interval([1.0], confidence=95)
    assert all(math.isnan(end) for end in percentile_interval([NAN]))
