"""The law of scaling: loss = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv:2203.15556).

N is the size of the model, D the number of tokens, and 6 N D the FLOPs. E is the loss that no size
and no data reach below. Losses are in nats per token, or in any other unit.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from lmjax.errors import UserError

HUBER = 1e-3  # residuals of log loss above it weigh less (Hoffmann et al. 2022, appendix D.2)
LEAST = 6  # runs; the law has five numbers
EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)  # of the points from which fits may start
FLOORS = (0.02, 0.3, 0.6, 0.8, 0.95)  # E there, as shares of the least loss
SAME = 0.05  # sizes, numbers of tokens or ratios that are closer, relatively, count once
STARTS = 6  # the best of these points, from which fits do start
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Observation:
    """A run: its size, its tokens and its loss."""

    parameters: float  # N: the FLOPs of a training token divided by 6
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        """The FLOPs of the run."""
        return 6 * self.parameters * self.tokens


@dataclasses.dataclass(frozen=True)
class Law:
    """The five numbers of the law."""

    floor: float  # E
    size_factor: float  # A
    size_exponent: float  # a
    data_factor: float  # B
    data_exponent: float  # b

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss of a model of this size after so many tokens."""
        return float(self.floor + self.size_factor / parameters**self.size_exponent
                     + self.data_factor / tokens**self.data_exponent)

    def best(self, flops: float) -> tuple[float, float]:
        """The size and the number of tokens that reach the lowest loss for a budget.

        The minimum of A / N^a + B / D^b with 6 N D = flops, where a A / N^a = b B / D^b.
        """
        a, b = self.size_exponent, self.data_exponent
        ratio = (a * self.size_factor / (b * self.data_factor)) ** (1 / (a + b))
        parameters = ratio * (flops / 6) ** (b / (a + b))
        return parameters, flops / 6 / parameters


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law and how well it is known."""

    law: Law
    residuals: tuple[float, ...]  # log of the measured loss minus log of the law's, per run
    samples: tuple[Law, ...]  # laws of resampled residuals (bootstrap)

    def interval(self, parameters: float, tokens: float) -> tuple[float, float]:
        """Where the loss of one run of this size lies with CONFIDENCE, its own noise included."""
        noise = np.random.default_rng(1).choice(self._noise, len(self.samples))
        losses = [law.loss(parameters, tokens) * math.exp(x)
                  for law, x in zip(self.samples, noise, strict=True)]
        return _between(losses)

    def interval_of_best(self, flops: float) -> tuple[float, float]:
        """Where the best size for a budget lies with CONFIDENCE."""
        return _between([law.best(flops)[0] for law in self.samples])

    def interval_of(self, name: str) -> tuple[float, float]:
        """Where one of the five numbers lies with CONFIDENCE."""
        return _between([getattr(law, name) for law in self.samples])

    @property
    def _noise(self) -> np.ndarray:
        return _widened(self.residuals)


def fit(runs: Sequence[Observation], bootstrap: int = 200) -> Fit:
    """Fits the law to runs: the Huber loss of the residuals of the log loss, from several starts.

    Args:
      runs: of at least three sizes and three ratios of tokens to size.
      bootstrap: laws that are fitted to resampled residuals, for the intervals.

    Raises:
      UserError: there are too few runs.
    """
    sizes, tokens, ratios = (_distinct(values) for values in (
        [run.parameters for run in runs], [run.tokens for run in runs],
        [run.tokens / run.parameters for run in runs]))
    if len(runs) < LEAST or min(sizes, tokens, ratios) < 3:
        raise UserError(f"at least {LEAST} finished runs of 3 sizes, 3 numbers of tokens and 3 "
                        "ratios of tokens to size", f"{len(runs)} of {sizes} sizes, {tokens} "
                        f"numbers of tokens and {ratios} ratios", "add sizes or ratios",
                        where="lmjax scale")
    n, d, losses = (np.log([getattr(run, name) for run in runs])
                    for name in ("parameters", "tokens", "loss"))
    centre = n.mean(), d.mean()  # the powers of N and D are taken around their means
    starts = [_start(n - centre[0], d - centre[1], np.exp(losses), *shape)
              for shape in itertools.product(EXPONENTS, EXPONENTS, FLOORS)]
    starts.sort(key=lambda x: float(np.sum(np.abs(
        _log_loss(x, n - centre[0], d - centre[1]) - losses))))
    found = _least(n - centre[0], d - centre[1], losses, starts[:STARTS])
    predicted = _log_loss(found, n - centre[0], d - centre[1])
    residuals, random, samples = losses - predicted, np.random.default_rng(0), []
    for _ in range(bootstrap):
        noisy = predicted + random.choice(_widened(residuals), len(runs))
        samples.append(_least(n - centre[0], d - centre[1], noisy, [found]))
    return Fit(_law(found, centre), tuple(residuals.tolist()),
               tuple(_law(sample, centre) for sample in samples))


def _distinct(values: Sequence[float]) -> int:
    """How many of these values differ by more than SAME."""
    return 1 + int(np.sum(np.diff(np.log(np.sort(values))) > SAME)) if values else 0


def _widened(residuals: Sequence[float] | np.ndarray) -> np.ndarray:
    """The residuals as large as the noise: five numbers were fitted to them."""
    count = len(residuals)
    centred = np.asarray(residuals) - np.mean(residuals)
    return centred * math.sqrt(count / max(count - 5, 1))


def _log_loss(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The log of the law's loss; x: log E, log A, a, log B, b."""
    return np.logaddexp(x[0], np.logaddexp(x[1] - x[2] * n, x[3] - x[4] * d))


def _start(n: np.ndarray, d: np.ndarray, losses: np.ndarray, a: float, b: float,
           floor: float) -> np.ndarray:
    """Where a fit with these exponents and this floor starts: A and B by least squares."""
    from scipy.optimize import nnls  # it takes half a second

    lowest = floor * losses.min()
    factors, _ = nnls(np.stack([np.exp(-a * n), np.exp(-b * d)], axis=1), losses - lowest)
    first, second = np.log(np.maximum(factors, 1e-4 * losses.min()))
    return np.array([math.log(lowest), first, a, second, b])


def _least(n: np.ndarray, d: np.ndarray, losses: np.ndarray,
           starts: Sequence[np.ndarray]) -> np.ndarray:
    """The best of the minima that are reached from `starts`."""
    from scipy.optimize import least_squares

    def jacobian(x: np.ndarray) -> np.ndarray:
        total = _log_loss(x, n, d)
        floor, size, data = (np.exp(part - total) for part in (
            x[0], x[1] - x[2] * n, x[3] - x[4] * d))
        return np.stack([floor, size, -n * size, data, -d * data], axis=1)

    low = [losses.min() - 12, losses.min() - 12, 0.01, losses.min() - 12, 0.01]
    high = [losses.min(), losses.max() + 3, 3.0, losses.max() + 3, 3.0]
    found = [least_squares(lambda x: _log_loss(x, n, d) - losses,
                           np.clip(start, np.add(low, 1e-6), np.subtract(high, 1e-6)), jacobian,
                           bounds=(low, high), loss="huber", f_scale=HUBER, max_nfev=300)
             for start in starts]
    return np.asarray(min(found, key=lambda result: float(result.cost)).x)


def _law(x: np.ndarray, centre: tuple[float, float]) -> Law:
    floor, size, a, data, b = map(float, x)
    return Law(math.exp(floor), math.exp(size + a * centre[0]), a,
               math.exp(data + b * centre[1]), b)


def _between(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
