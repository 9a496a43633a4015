"""The law of scaling against laws that were planted."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lmjax.errors import UserError
from lmjax.scaling.ladder import table
from lmjax.scaling.law import Fit, Law, Observation, fit

CHINCHILLA = Law(1.69, 406.4, 0.34, 410.7, 0.28)
SMALL = Law(1.2, 400.0, 0.45, 900.0, 0.4)
LADDER = [(n, n * ratio) for n in (2e6, 5e6, 1.2e7, 3e7, 7e7) for ratio in (10, 20, 40, 80)]


def planted(law: Law, noise: float, seed: int) -> list[Observation]:
    random = np.random.default_rng(seed)
    return [Observation(n, d, law.loss(n, d) * np.exp(noise * random.standard_normal()))
            for n, d in LADDER]


def test_a_law_without_noise_is_found() -> None:
    for law in (CHINCHILLA, SMALL):
        found = fit(planted(law, 0.0, 0), bootstrap=0).law
        for name in ("floor", "size_factor", "size_exponent", "data_factor", "data_exponent"):
            assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-2), name


@pytest.mark.long
@pytest.mark.parametrize("law", [CHINCHILLA, SMALL])
def test_intervals_cover_the_truth(law: Law) -> None:
    """Noise of 0.2%; forecasts for 30 times the FLOPs of the largest run."""
    n, d = 7e7 * 30**0.5, 80 * 7e7 * 30**0.5
    inside = {"forecast": 0, "size_exponent": 0, "data_exponent": 0, "best size": 0}
    draws = 8
    for seed in range(draws):
        found = fit(planted(law, 2e-3, seed), bootstrap=40)
        assert found.law.size_exponent == pytest.approx(law.size_exponent, abs=0.2)
        assert found.law.data_exponent == pytest.approx(law.data_exponent, abs=0.2)
        assert found.law.loss(n, d) == pytest.approx(law.loss(n, d), rel=0.03)
        low, high = found.interval(n, d)
        inside["forecast"] += low <= law.loss(n, d) <= high
        assert high < 1.2 * low
        for name in ("size_exponent", "data_exponent"):
            low, high = found.interval_of(name)
            inside[name] += low <= getattr(law, name) <= high
        low, high = found.interval_of_best(6 * n * d)
        inside["best size"] += low <= law.best(6 * n * d)[0] <= high
    assert min(inside.values()) >= 0.75 * draws, inside


def test_the_best_size_is_the_minimum_at_these_flops() -> None:
    flops = 1e21
    n, d = CHINCHILLA.best(flops)
    assert 6 * n * d == pytest.approx(flops)
    least = minimize_scalar(lambda x: CHINCHILLA.loss(np.exp(x), flops / 6 / np.exp(x)),
                            bounds=(15, 30), method="bounded", options={"xatol": 1e-9})
    assert n == pytest.approx(np.exp(least.x), rel=1e-3)


def test_an_outlier_moves_the_fit_little() -> None:
    runs = planted(SMALL, 0.0, 0)
    runs[7] = Observation(runs[7].parameters, runs[7].tokens, 1.5 * runs[7].loss)
    assert fit(runs, bootstrap=0).law.loss(1e9, 2e10) == pytest.approx(
        SMALL.loss(1e9, 2e10), rel=5e-3)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UserError, match="3 sizes"):
        fit([run for run in planted(SMALL, 0.0, 0) if run.parameters < 1e7])


def test_one_ratio_of_tokens_to_size_is_refused() -> None:
    """Then size and data cannot be told apart; steps are integers, so the ratios are not equal."""
    runs = [Observation(n, n * 20 * (1 + 0.01 * (n % 3)), 3.0) for n in range(10, 70, 10)]
    with pytest.raises(UserError, match="of 6 sizes, 6 numbers of tokens and 1 ratios"):
        fit(runs)


def test_an_interval_of_the_best_size_that_runs_say_nothing_of_is_open() -> None:
    runs = planted(SMALL, 0.0, 0)
    names, zeros = {str(i): run for i, run in enumerate(runs)}, (0.0,) * len(runs)

    def interval(*factors: float) -> str:
        laws = tuple(Law(1.2, 400 * x, 0.45, 900.0, 0.4) for x in factors * 20)
        return next(row for row in table(names, Fit(SMALL, zeros, laws), [1e18])
                    if row.startswith("| 1e+18")).split(" | ")[2]

    assert " to " in interval(0.9, 1.1)
    assert interval(1, 1e12).startswith("more than")
    assert interval(1e-12, 1).startswith("less than")
    assert interval(1e-12, 1e12) == "unknown"
