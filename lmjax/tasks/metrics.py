"""Figures of predictions, by scikit-learn, SciPy, sacrebleu and rouge-score."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from lmjax.errors import UserError

PACKAGES = {"sklearn": "scikit-learn", "seqeval": "seqeval", "sacrebleu": "sacrebleu",
            "rouge_score": "rouge-score"}


def check_installed(*modules: str) -> None:
    """Raises a UserError for the first of these modules that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"the package {PACKAGES[module]}, which computes the metric", "none",
                            "pip install 'lmjax[tasks]'", where="config.task")


def single_label(predicted: Sequence[str], truth: Sequence[str],
                 labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, the mean F1 of the classes, and Matthews' correlation."""
    from sklearn import metrics

    return {"accuracy": float(metrics.accuracy_score(truth, predicted)),
            "f1": float(metrics.f1_score(truth, predicted, labels=list(labels), average="macro",
                                         zero_division=0.0)),
            "matthews": float(metrics.matthews_corrcoef(truth, predicted))}


def tags(predicted: Sequence[str], truth: Sequence[str],
         labels: Sequence[str]) -> dict[str, float]:
    """Accuracy of words, and the means over tags of precision, recall and F1."""
    from sklearn import metrics

    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truth, predicted, labels=list(labels), average="macro", zero_division=0.0)
    return {"accuracy": float(metrics.accuracy_score(truth, predicted)),
            "precision": float(precision), "recall": float(recall), "f1": float(f1)}


def multi_label(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]],
                labels: Sequence[str]) -> dict[str, float]:
    """F1 over all decisions (micro) and as the mean of the classes (macro), and exact matches."""
    from sklearn import metrics

    def table(rows: Sequence[Sequence[str]]) -> list[list[bool]]:
        return [[label in row for label in labels] for row in rows]

    a, b = table(truth), table(predicted)
    return {"f1_micro": float(metrics.f1_score(a, b, average="micro", zero_division=0.0)),
            "f1": float(metrics.f1_score(a, b, average="macro", zero_division=0.0)),
            "exact_match": float(metrics.accuracy_score(a, b))}


def regression(predicted: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    """The mean squared error, and the correlations of Pearson and of Spearman."""
    import warnings

    from scipy import stats
    from sklearn import metrics

    with warnings.catch_warnings():  # a constant answer has no correlation: not a number
        warnings.simplefilter("ignore")
        pearson, spearman = stats.pearsonr(truth, predicted)[0], stats.spearmanr(
            truth, predicted)[0]
    return {"mse": float(metrics.mean_squared_error(truth, predicted)),
            "pearson": float(pearson), "spearman": float(spearman)}


def translation(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015) of a corpus, 0 to 100."""
    import sacrebleu

    return {"bleu": sacrebleu.corpus_bleu(answers, [truths]).score,
            "chrf": sacrebleu.corpus_chrf(answers, [truths]).score}


def summary(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """The means of ROUGE-1, -2 and -L (Lin 2004) as F1, 0 to 1, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    scores = [scorer.score(truth, answer) for truth, answer in zip(truths, answers, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """The share of answers that are the right text."""
    right = sum(a == b for a, b in zip(answers, truths, strict=True))
    return {"exact_match": right / len(truths)}
