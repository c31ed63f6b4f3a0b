"""Statistics against closed forms and scipy: `pytest tests/test_statistics.py`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from eval.statistics import (
    Spread,
    compare,
    holm,
    repeat_sd,
    sign_flip_p,
    smallest_detectable,
    spread,
    studentised_bootstrap,
    subjects_needed,
    t_interval,
    verdict,
)

D = np.array([0.021, -0.004, 0.013, 0.008, 0.017, 0.002, -0.001, 0.011])


def test_t_interval_is_scipys() -> None:
    expected = stats.ttest_1samp(D, 0.0).confidence_interval(0.9)
    assert t_interval(D, 0.9) == pytest.approx((expected.low, expected.high))
    assert t_interval([0.3]) is None
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)


def test_sign_flip_p_is_exact() -> None:
    by_hand = np.mean([abs(np.dot(signs, D)) >= abs(D.sum()) - 1e-15 for signs in itertools.product((1, -1), repeat=8)])
    assert sign_flip_p(D) == pytest.approx(by_hand)
    reference = stats.permutation_test((D, np.zeros(8)), lambda a, b: np.mean(a - b), permutation_type="samples")
    assert sign_flip_p(D) == pytest.approx(reference.pvalue)


def test_sign_flip_p_in_closed_form() -> None:
    for n in (1, 2, 5, 10, 20):
        assert sign_flip_p(np.arange(1, n + 1) / 7) == 2.0 ** (1 - n)  # only all + and all - are as extreme
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0  # a sum of zero, up to rounding
    assert sign_flip_p([0.1] * 7 + [-0.1]) == pytest.approx(2 * (1 + 8) / 2**8)  # ties are counted in


def test_sign_flip_p_of_many_subjects_is_drawn() -> None:
    d = np.random.default_rng(3).normal(0.25, 1.0, size=24)
    t = stats.ttest_1samp(d, 0.0).pvalue
    assert sign_flip_p(d) == pytest.approx(t, abs=0.02)
    assert sign_flip_p(np.ones(40)) == pytest.approx(1 / 100_001)
    assert sign_flip_p(d, seed=1) == sign_flip_p(d, seed=1)


def test_bootstrap_is_seeded_and_close_to_t_on_normal_data() -> None:
    d = np.random.default_rng(0).normal(0.1, 1.0, size=200)
    low, high = t_interval(d) or (0, 0)
    interval = studentised_bootstrap(d, seed=1)
    assert interval == studentised_bootstrap(d, seed=1) != studentised_bootstrap(d, seed=2)
    assert interval == pytest.approx((low, high), abs=0.1 * (high - low))


def test_bootstrap_leans_the_way_the_data_do() -> None:
    skewed = np.random.default_rng(1).exponential(size=15)
    low, high = studentised_bootstrap(skewed) or (0, 0)
    assert high - skewed.mean() > skewed.mean() - low  # a t interval would be symmetric


def test_bootstrap_moves_and_scales_with_the_data() -> None:
    low, high = studentised_bootstrap(D) or (0, 0)
    assert studentised_bootstrap(-2 * D + 1) == pytest.approx((1 - 2 * high, 1 - 2 * low), abs=1e-4)


def test_bootstrap_coverage_at_five_subjects() -> None:
    """The percentile bootstrap covers 84 % here."""
    rng = np.random.default_rng(0)
    intervals = [studentised_bootstrap(rng.normal(size=5), draws=1000, seed=i) for i in range(300)]
    covered = np.mean([interval is not None and interval[0] <= 0 <= interval[1] for interval in intervals])
    assert covered > 0.90


def test_bootstrap_of_too_few_or_equal_differences() -> None:
    assert studentised_bootstrap([0.1]) is None
    assert studentised_bootstrap([0.1, 0.2]) is None
    assert studentised_bootstrap([0.1, 0.2, 0.4]) is None
    assert studentised_bootstrap([0.1, 0.2, 0.4, 0.5]) is not None
    assert studentised_bootstrap([0.2, 0.2, 0.2, 0.2]) == pytest.approx((0.2, 0.2))


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({"only": 0.04}) == {"only": 0.04}
    assert holm({}) == {}


def test_verdicts() -> None:
    assert verdict((0.001, 0.02), 0.01) == "better"
    assert verdict((-0.02, -0.001), 0.01) == "worse"
    assert verdict((-0.01, 0.02), 0.01) == "undecided"
    assert verdict((-0.005, 0.006), 0.01) == "undecided"  # an interval over zero is no tie without a bound
    assert verdict((-0.005, 0.006), 0.9, bound=0.01) == "tie"
    assert verdict((0.001, 0.006), 0.01, bound=0.01) == "tie"
    assert verdict((-0.005, 0.01), 0.9, bound=0.01) == "undecided"
    assert verdict((0.005, 0.02), 0.01, bound=0.01) == "better"
    assert verdict(None, 1.0, bound=0.01) == "undecided"


def test_better_takes_the_interval_and_the_exact_p() -> None:
    assert verdict((0.001, 0.02), 0.0625) == "undecided"  # the interval leaves out zero, p is too large
    assert [verdict((0.001, 0.02), p) for p in (0.05, 0.051)] == ["better", "undecided"]
    assert [verdict((0.001, 0.02), p, level=0.9) for p in (0.1, 0.11)] == ["better", "undecided"]
    assert verdict((-0.001, 0.02), 0.04) == "undecided"  # and the other way round
    assert compare([0.1, 0.1]).verdict == "undecided"  # an interval of no width, p = 0.5
    for n in range(2, 12):
        found = compare(np.linspace(0.1, 0.11, n))
        assert found.t_interval is not None and found.t_interval[0] > 0 and found.p == 2.0 ** (1 - n)
        assert found.verdict == ("better" if n > 5 else "undecided")
        assert compare(np.linspace(-0.11, -0.1, n)).verdict == ("worse" if n > 5 else "undecided")
    assert compare(np.linspace(0.1, 0.11, 5), level=0.9).verdict == "better"
    assert compare([0.001, 0.001], bound=0.01).verdict == "tie"


def test_compare_puts_it_together() -> None:
    found = compare(D, bound=0.05)
    assert (found.n, found.wins, found.losses) == (8, 6, 2)
    assert found.mean == pytest.approx(D.mean()) and found.sd == pytest.approx(D.std(ddof=1))
    assert found.t_interval == t_interval(D) and found.p == sign_flip_p(D)
    assert found.verdict == "tie" and compare(D).verdict == "better" and compare(-D).verdict == "worse"
    alone = compare([0.3])
    assert (alone.sd, alone.t_interval, alone.bootstrap_interval, alone.p, alone.verdict) == (
        None,
        None,
        None,
        1.0,
        "undecided",
    )


@pytest.mark.parametrize("bad", [[], [[0.1, 0.2]], [0.1, float("nan")], [float("inf")]])
def test_what_is_no_set_of_differences(bad: list) -> None:
    with pytest.raises(ValueError):
        compare(bad)


def test_smallest_detectable_difference() -> None:
    assert smallest_detectable(0.02, 30) == pytest.approx(0.0102, abs=1e-4)
    power = stats.nct.sf(stats.t.ppf(0.975, 29), 29, smallest_detectable(0.02, 30) / 0.02 * 30**0.5)
    assert power == pytest.approx(0.8, abs=0.03)


def test_spread_of_a_table_is_the_analysis_of_variance() -> None:
    rng = np.random.default_rng(0)
    subjects, seeds = rng.normal(0, 0.3, size=(4000, 1)), rng.normal(0, 0.1, size=(4000, 3))
    found = spread(subjects + seeds)
    assert found.subject == pytest.approx(0.3, rel=0.05) and found.seed == pytest.approx(0.1, rel=0.05)
    assert spread(seeds - seeds.mean(axis=1, keepdims=True)).subject == 0  # never below zero
    assert spread(D[:, None]) == Spread(pytest.approx(D.std(ddof=1)), None)
    assert spread([[0.1, 0.3]]) == Spread(None, pytest.approx(0.2 / 2**0.5))


def test_subjects_needed_is_the_inverse_of_what_is_detectable() -> None:
    n = subjects_needed(0.05, 0.02)
    assert smallest_detectable(0.05, n) <= 0.02 < smallest_detectable(0.05, n - 1)
    assert subjects_needed(1e-9, 0.02) == 6  # fewer cannot give a p below 0.05


def test_two_runs_of_one_thing_show_its_noise() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.5, 0.04, size=(2, 20_000))
    assert repeat_sd(first, second) == pytest.approx(0.04, rel=0.03)
    assert repeat_sd([], []) is None
