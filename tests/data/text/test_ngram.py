"""N-gram baselines against a dictionary twin, and as probabilities."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from lmjax.data.text import ngram
from lmjax.data.text.ngram import Counts, NGram

BOS, EOS, V = 1, 2, 12


def documents(seed, count):
    rng = np.random.default_rng(seed)
    words = [3 + rng.integers(0, V - 3, rng.integers(1, 15)) // rng.integers(1, 4)
             for _ in range(count)]
    return [[BOS, *w, EOS] for w in words]


def flat(docs):
    return np.array([t for d in docs for t in d], np.uint16)


class Twin:
    """Interpolated modified Kneser-Ney with dictionaries, written from the formula."""

    def __init__(self, docs, order):
        self.counts = []
        for n in range(1, order + 1):
            if n == order:
                grams = Counter(tuple(d[i : i + n]) for d in docs for i in range(len(d) - n + 1))
            else:
                before = defaultdict(set)
                for d in docs:
                    for i in range(1, len(d) - n + 1):
                        before[tuple(d[i : i + n])].add(d[i - 1])
                grams = Counter({g: len(s) for g, s in before.items()})
                grams.update(tuple(d[:n]) for d in docs if len(d) >= n)
            self.counts.append({g: c for g, c in grams.items() if g != (BOS,)})
        self.discounts = [self.estimate(c.values()) for c in self.counts]

    def estimate(self, values):
        n = Counter(values)
        if not n[1] or not n[2]:
            return {1: 0.5, 2: 0.5, 3: 0.5}
        y = n[1] / (n[1] + 2 * n[2])
        raw = {c: c - (c + 1) * y * n[c + 1] / n[c] if n[c] else c / 2 for c in (1, 2, 3)}
        return {c: min(max(d, 0.01), c - 0.01) for c, d in raw.items()}

    def probability(self, history, word, k):
        if k == 0:
            return 1 / V
        lower = self.probability(history[1:], word, k - 1)
        follow = {g[-1]: c for g, c in self.counts[k - 1].items() if g[:-1] == history}
        if not follow:
            return lower
        discount, total = self.discounts[k - 1], sum(follow.values())
        c = follow.get(word, 0)
        own = c - discount[min(c, 3)] if c else 0
        return own / total + sum(discount[min(f, 3)] for f in follow.values()) / total * lower


def history_of(document, at, order):
    return tuple(document[max(0, at - order + 1) : at])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_twin(order):
    train, test = documents(0, 60), documents(1, 12)
    model = NGram(Counts(flat(train), order=5, vocab_size=V, bos_id=BOS), order=order)
    got = model.log_probs(flat(test))
    twin = Twin(train, order)
    want = []
    for d in test:
        want.append(0.0)
        for i in range(1, len(d)):
            history = history_of(d, i, order)
            want.append(math.log(twin.probability(history, d[i], len(history) + 1)))
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one(order):
    train = documents(2, 50)
    model = NGram(Counts(flat(train), order=order, vocab_size=V, bos_id=BOS), order=order)
    for document in documents(3, 10) + train[:5]:
        for end in range(1, len(document)):
            total = 0.0
            for word in range(V):
                if word != BOS:
                    tokens = np.array([*document[:end], word], np.uint16)
                    total += math.exp(model.log_probs(tokens)[-1])
            # BOS is never predicted, but has its share of 1 / V.
            missing = model_probability_of_bos(model)
            assert total <= 1 + 1e-9 and total + missing >= 1 - 1e-9


def model_probability_of_bos(model):
    p = 1 / V
    for order in model._orders[:1]:
        p *= float(order.backoff_H[0])
    return p


def test_documents_do_not_see_each_other():
    train = documents(4, 40)
    model = NGram(Counts(flat(train), order=5, vocab_size=V, bos_id=BOS), order=5)
    test = documents(5, 6)
    alone = np.concatenate([model.log_probs(flat([d])) for d in test])
    np.testing.assert_array_equal(model.log_probs(flat(test)), alone)


def test_baselines_know_more_with_longer_histories():
    rng = np.random.default_rng(0)
    # Nine times out of ten the last two tokens decide the next one.
    following = rng.integers(3, V, (V, V))

    def document():
        d = [BOS, 3]
        for _ in range(60):
            d.append(int(following[d[-2], d[-1]]) if rng.random() < 0.9
                     else int(rng.integers(3, V)))
        return [*d, EOS]

    train, test = flat([document() for _ in range(200)]), flat([document() for _ in range(20)])
    result = ngram.baselines(train, test, heldout_bytes=1000, vocab_size=V, bos_id=BOS)
    losses = [b["loss"] for b in result["baselines"]]
    assert losses == sorted(losses, reverse=True) and losses[2] < 0.8 < 1.8 < losses[0]
    predictions = result["heldout"]["tokens"]
    assert predictions == len(test) - 20
    for b in result["baselines"]:
        assert b["bits_per_byte"] == pytest.approx(b["loss"] * predictions / 1000 / math.log(2))
