"""A learnt filter: tells texts that are like a few good examples from the rest of a corpus.

It learns from examples of good text, and from a sample of the corpus in the place of bad text. The
sample holds good text too, which costs nothing: a text like the examples still scores higher than
one that only the corpus has (learning from positive and unlabelled data; Elkan and Noto, 2008).

The score is a logistic regression on two kinds of features:
- the text's words and pairs of neighbouring words, hashed;
- how well n-gram models predict it, per word or character. One model of words and one of
  characters have read the good examples. Another model of words has read the corpus: text whose
  words are in no order, or which repeats a template, is not as predictable as good text is.

Texts are divided into FOLDS by their hash. A text is scored by models that have read nothing of its
fold, so the scores of the examples say how good text that was never seen scores. The threshold is
the score that all but a share `lost` of the examples reach.

Shape legend: D texts, T tokens, F predictability features.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from lmjax.data.text.ngram import Counts, NGram
from lmjax.data.text.words import Words, batches, ngrams, split
from lmjax.errors import UserError

FOLDS = 3
BEGINNING = 10_000  # characters of a text that are learnt from, and that decide its fold
LEAST_EXAMPLES = 100  # with fewer, the threshold would be a guess
BUCKETS = 1 << 16  # of hashed words and pairs of words
WORDS, CHARACTERS = 1 << 20, 1 << 13  # ids of the n-gram models; id 0 begins a text
# The orders of the n-gram models, by what they have read. Each order is a model of its own: within
# one model the lower orders count neighbours, and say less about the order of words.
ORDERS = {"good_words": (1, 2, 3), "good_characters": (2, 5), "corpus_words": (1, 2, 3)}
INVERSE_PENALTY = 0.1  # scikit-learn's C
FARTHEST = 6.0  # standard deviations at which a predictability is cut off


class Fold(NamedTuple):
    """The models that score the texts of one fold, learnt from the texts of the others."""

    models: dict[str, list[NGram]]  # one per order, by the keys of ORDERS
    mean_F: np.ndarray  # of the good examples' predictabilities
    deviation_F: np.ndarray
    weights: np.ndarray  # of the regression: [BUCKETS + 2 F]
    bias: float


class Quality(NamedTuple):
    """A learnt filter. A text with a score below `threshold` is removed."""

    folds: list[Fold]
    threshold: float

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """The score of each text (or its beginning), higher for better ones; float64 [D]."""
        out = np.zeros(len(texts))
        for base, group in batches(texts):
            words = split(group)
            hashed, fold_D = _hashed(words), _fold_of(group)
            for k, fold in enumerate(self.folds):
                mine = np.flatnonzero(fold_D == k)
                if mine.size:
                    features = _features(fold, hashed[mine], _tokens(words, mine))
                    out[base + mine] = features @ fold.weights + fold.bias
        return out


def fit(good: Sequence[str], corpus: Sequence[str], lost: float) -> Quality:
    """Learns a filter.

    Args:
      good: the beginnings of examples of good text.
      corpus: the beginnings of a sample of the texts that will be judged.
      lost: the share of good text that may be removed, in (0, 1).
    Raises:
      UserError: there are fewer than LEAST_EXAMPLES examples or texts to judge, or scikit-learn is
        not installed.
    """
    for given, key in ((good, "good"), (corpus, "only")):
        if len(given) < LEAST_EXAMPLES:
            what = "different examples" if key == "good" else "documents to judge"
            raise UserError(f"{LEAST_EXAMPLES} {what} or more", len(given), "add some",
                            where=f"data.curate.quality.{key}")
    texts = [*good, *corpus]
    fold_D, is_good_D = _fold_of(texts), np.arange(len(texts)) < len(good)
    words = split(texts)
    tokens = {name: _cut(values, ends) for name, (values, ends)
              in _tokens(words, np.arange(len(texts))).items()}
    hashed = _hashed(words)
    # The n-gram models of a fold have not read it. Its texts are described by them even where the
    # regression of another fold learns from these texts: else good examples would look too good.
    models = [_models(tokens, np.flatnonzero(fold_D != k), is_good_D) for k in range(FOLDS)]
    predicted_DF = np.zeros((len(texts), sum(map(len, ORDERS.values()))))
    for k, its in enumerate(models):
        mine = np.flatnonzero(fold_D == k)
        predicted_DF[mine] = _predictability(its, _tokens(words, mine))
    folds, scores_D = [], np.zeros(len(texts))
    for k, its in enumerate(models):
        learn_D = fold_D != k
        of_good = predicted_DF[learn_D & is_good_D]
        empty = Fold(its, of_good.mean(0), of_good.std(0) + 1e-6, np.zeros(0), 0.0)
        features = sparse.hstack([hashed, _shaped(empty, predicted_DF)]).tocsr()
        weights, bias = _regress(features[learn_D], is_good_D[learn_D])
        folds.append(empty._replace(weights=weights, bias=bias))
        scores_D[~learn_D] = features[~learn_D] @ weights + bias
    return Quality(folds, float(np.quantile(scores_D[is_good_D], lost)))


def _regress(features: sparse.csr_matrix, good_D: np.ndarray) -> tuple[np.ndarray, float]:
    """Logistic regression in which both kinds of text weigh the same: (weights, bias)."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("scikit-learn", f"no such package ({error})",
                        "pip install 'lmjax[quality]'", where="data.curate.quality") from None
    model = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced",
                               solver="liblinear", random_state=0)
    model.fit(features, good_D)
    return model.coef_[0], float(model.intercept_[0])


def _fold_of(texts: Sequence[str]) -> np.ndarray:
    """The fold of each text, by its beginning: copies are in the same one; int64 [D]."""
    return np.array([zlib.crc32(text[:BEGINNING].encode()) % FOLDS for text in texts], np.int64)


def _hashed(words: Words) -> sparse.csr_matrix:
    """Which words and pairs of words a text has: [D, BUCKETS], rows of length 1."""
    texts = len(words.bounds_D1) - 1
    rows, columns = [], []
    for n in (1, 2):
        hash_G, first_G = ngrams(words, n)
        rows.append(words.doc_W[first_G])
        columns.append((hash_G % np.uint64(BUCKETS)).astype(np.int64))
    row, column = np.concatenate(rows), np.concatenate(columns)
    out = sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=(texts, BUCKETS))
    out.data[:] = 1.0
    return sparse.diags_array(np.maximum(out.getnnz(1), 1) ** -0.5) @ out


def _tokens(words: Words, of: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The tokens of some texts for each model of ORDERS, end to end, and where each text ends."""
    word_W = 1 + (words.hash_W % np.uint64(WORDS - 1)).astype(np.int64)
    code_C = 1 + words.codes_C.astype(np.int64) % (CHARACTERS - 1)
    end_D = np.append(words.offset_D[1:], len(words.codes_C)) - 1  # without the last newline
    found = {"words": _joined([word_W[words.bounds_D1[d]:words.bounds_D1[d + 1]] for d in of]),
             "characters": _joined([code_C[words.offset_D[d]:end_D[d]] for d in of])}
    return {name: found[name.rpartition("_")[2]] for name in ORDERS}


def _joined(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts, each behind a 0, end to end: int64 [T]; and where each ends: [D]."""
    tokens = [np.concatenate([[0], ids]) for ids in texts]
    return np.concatenate([np.zeros(0, np.int64), *tokens]), np.cumsum([*map(len, tokens)])


def _cut(tokens: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return np.split(tokens, ends[:-1])


def _models(tokens: dict[str, list[np.ndarray]], of: np.ndarray,
            is_good_D: np.ndarray) -> dict[str, list[NGram]]:
    """The n-gram models that have read the texts `of`, or the good ones among them."""
    made = {}
    for name, orders in ORDERS.items():
        read = of if name.startswith("corpus") else of[is_good_D[of]]
        size = WORDS if name.endswith("words") else CHARACTERS
        counts = Counts(np.concatenate([tokens[name][d] for d in read]), order=max(orders),
                        vocab_size=size, bos_id=0)
        made[name] = [NGram(counts, order=order) for order in orders]
    return made


def _predictability(models: dict[str, list[NGram]],
                    tokens: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """How well the models predict each text, in nats per token: [D, F].

    Of each kind of model, the lowest order's, and what each higher order gains.
    """
    columns = []
    for name, by_order in models.items():
        flat, ends = tokens[name]
        first = np.concatenate([[0], ends[:-1]])
        sums = [np.add.reduceat(model.log_probs(flat), first) for model in by_order]
        mean_D = np.stack(sums) / np.maximum(ends - first - 1, 1)
        columns += [mean_D[0], *np.diff(mean_D, axis=0)]
    return np.stack(columns, axis=1)


def _shaped(fold: Fold, predicted_DF: np.ndarray) -> sparse.csr_matrix:
    """Predictabilities in deviations from the good examples, and their squares: [D, 2 F]."""
    z_DF = (predicted_DF - fold.mean_F) / fold.deviation_F
    z_DF = np.clip(z_DF, -FARTHEST, FARTHEST)
    return sparse.csr_matrix(np.concatenate([z_DF, z_DF**2 / 3], axis=1))


def _features(fold: Fold, hashed: sparse.csr_matrix,
              tokens: dict[str, tuple[np.ndarray, np.ndarray]]) -> sparse.csr_matrix:
    return sparse.hstack([hashed, _shaped(fold, _predictability(fold.models, tokens))]).tocsr()


def save(quality: Quality, folder: str) -> None:
    """Writes a filter as .npz files, the same bytes for the same filter."""
    for k, fold in enumerate(quality.folds):
        arrays: dict[str, Any] = fold._asdict()
        models = arrays.pop("models")
        arrays |= {f"{name}/{i}/{key}": value for name, by_order in models.items()
                   for i, model in enumerate(by_order) for key, value in model.arrays().items()}
        np.savez(os.path.join(folder, f"fold-{k}.npz"), threshold=quality.threshold, **arrays)


def load(folder: str) -> Quality:
    """Reads what `save` wrote."""
    folds, threshold = [], 0.0
    for k in range(FOLDS):
        with np.load(os.path.join(folder, f"fold-{k}.npz")) as file:
            arrays, threshold = dict(file), float(file["threshold"])
        models = {name: [NGram.of_arrays(_under(f"{name}/{i}/", arrays))
                         for i in range(len(orders))] for name, orders in ORDERS.items()}
        folds.append(Fold(models, arrays["mean_F"], arrays["deviation_F"], arrays["weights"],
                          float(arrays["bias"])))
    return Quality(folds, threshold)


def _under(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in arrays.items()
            if key.startswith(prefix)}
