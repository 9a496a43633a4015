"""What a task gives without a network: the most frequent answer, and words without their order.

Each column of the table has a few candidates. The one that is best on the held-out examples answers
the test examples, and the task itself computes the figure, as it does for a model.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.tasks import squad
from lmjax.tasks.classification import Classification
from lmjax.tasks.embeddings import Embeddings
from lmjax.tasks.grpo import Grpo
from lmjax.tasks.preferences import Preferences
from lmjax.tasks.questions import Questions
from lmjax.tasks.tagging import Tagging
from lmjax.tasks.task import Facts, Predicted, Record, Task
from lmjax.tasks.templates import fill, value
from lmjax.tasks.writing import WritingTask

WORD = r"[^\W_]+"  # the parts of a_name are words, too
C = (1.0, 10.0)  # inverse strengths of regularisation that are tried
NEIGHBOURS = 2  # words to each side that decide the tag of a word
Records = Sequence[Record]
Answerer = Callable[[Records], list[Predicted]]
Candidates = dict[str, Answerer]


class Baseline(NamedTuple):
    """A cell of the table."""

    name: str  # of the candidate that is best on the held-out examples
    value: float  # its figure on the test examples


def baselines(task: Task, metric: str, train: Records, heldout: Records,
              test: Records) -> dict[str, Baseline]:
    """The two columns without a network: `majority` knows no input, `words` knows no order.

    Args:
      task: what is to be answered.
      metric: one of `task.measures`; higher is better.
      train, heldout, test: examples to learn from, to choose by, and to report.
    """
    facts = task.facts(train)
    if isinstance(task, Tagging):
        columns = _tags(task, facts, train)
    elif isinstance(task, Preferences):
        columns = _preferences(task, train)
    elif isinstance(task, Embeddings):
        columns = _embeddings(task, train)
    else:
        columns = _texts(task, facts, train)

    def figure(answerer: Answerer, records: Records) -> float:
        return _figure(task, facts, metric, answerer(records))

    found = {}
    for column, candidates in zip(("majority", "words"), columns, strict=True):
        best = max(candidates, key=lambda name: figure(candidates[name], heldout))
        found[column] = Baseline(best, figure(candidates[best], test))
    return found


def _figure(task: Task, facts: Facts, metric: str, predicted: Sequence[Predicted]) -> float:
    if isinstance(task, Questions):  # whose spans a text alone does not give
        score = {"exact_match": squad.exact_match, "f1": squad.f1}[metric]
        return float(np.mean([score(p.text, task.truth(p.record)) for p in predicted]))
    return task.metrics(predicted, facts)[metric]


def _vectorizers() -> dict[str, Any]:
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    return {"counts": CountVectorizer(token_pattern=WORD),
            "TF-IDF": TfidfVectorizer(token_pattern=WORD, sublinear_tf=True)}


def _regressions(x: Any, y: Any, **options: Any) -> dict[float, Any]:
    from sklearn.linear_model import LogisticRegression

    return {c: LogisticRegression(C=c, max_iter=300, tol=1e-3, **options).fit(x, y) for c in C}


def _texts(task: Task, facts: Facts, train: Records) -> tuple[Candidates, Candidates]:
    """Tasks that read a text and answer a text: a class, or words.

    A class is chosen by logistic regression; free text is that of the training example whose words
    are the most similar.
    """
    read = [_read(task, record) for record in train]
    truths = [_truth(task, record) for record in train]
    frequent = Counter(truths).most_common(1)[0][0]

    def by(answers: Callable[[list[str]], Sequence[str]]) -> Answerer:
        return lambda records: [
            _answered(task, facts, record, answer) for record, answer in zip(
                records, answers([_read(task, record) for record in records]), strict=True)]

    def linear(vectors: Any, model: Any) -> Answerer:
        return by(lambda texts: model.predict(vectors.transform(texts)))

    def nearest(vectors: Any, known: Any) -> Answerer:
        return by(lambda texts: [truths[i] for i in np.argmax(
            (vectors.transform(texts) @ known.T).toarray(), axis=1)])

    majority: Candidates = {"most frequent answer": by(lambda texts: [frequent] * len(texts))}
    words: Candidates = {}
    is_class = isinstance(task, Classification | Grpo)
    if not is_class:
        majority["copied input"] = by(lambda texts: texts)
    for name, vectors in _vectorizers().items():
        known = vectors.fit_transform(read)
        if is_class:
            words |= {f"logistic regression on {name}, C={c:g}": linear(vectors, model)
                      for c, model in _regressions(known, truths).items()}
        elif name == "TF-IDF":
            words["answer to the most similar input, TF-IDF"] = nearest(vectors, known)
    return majority, words


def _read(task: Task, record: Record) -> str:
    """The text that an example gives, without its answer, which a task that writes puts last."""
    texts = task.texts(record)
    return "\n".join(texts[:-1] if isinstance(task, WritingTask) else texts)


def _truth(task: Task, record: Record) -> str:
    truth = task.truth(record)
    return truth if isinstance(truth, str) else next(iter(truth), "")


def _answered(task: Task, facts: Facts, record: Record, answer: str) -> Predicted:
    """An answer in the form in which the task reads that of a model."""
    arrays = {}
    if isinstance(task, Classification):
        arrays = {"counts": np.ones(1), "confidence": np.ones(1),
                  "predicted": np.array([facts["labels"].index(answer)])}
    return Predicted("", record, arrays, text=answer)


def _tags(task: Tagging, facts: Facts, train: Records) -> tuple[Candidates, Candidates]:
    """Logistic regression on each word and its neighbours."""
    from sklearn.feature_extraction import DictVectorizer

    def features(record: Record) -> list[dict[str, str]]:
        padded = [""] * NEIGHBOURS + value(record, task.tokens) + [""] * NEIGHBOURS
        around = range(2 * NEIGHBOURS + 1)
        return [{str(i): padded[at + i] for i in around}
                for at in range(len(padded) - 2 * NEIGHBOURS)]

    def by(tag: Callable[[list[dict[str, str]]], Sequence[str]]) -> Answerer:
        def answered(records: Records) -> list[Predicted]:
            found = []
            for record in records:
                tags = tag(features(record))
                found.append(Predicted("", record, {
                    "words": np.arange(1, len(tags) + 1), "confidence": np.ones(len(tags)),
                    "predicted": np.array([facts["labels"].index(name) for name in tags])}))
            return found
        return answered

    def linear(model: Any) -> Answerer:
        return by(lambda words: model.predict(vectors.transform(words)))

    tags = [*itertools.chain(*(task.truth(record) for record in train))]
    vectors = DictVectorizer()
    known = vectors.fit_transform([*itertools.chain(*map(features, train))])
    frequent = Counter(tags).most_common(1)[0][0]
    return ({"most frequent tag": by(lambda words: [frequent] * len(words))},
            {f"logistic regression on a word and its neighbours, C={c:g}": linear(model)
             for c, model in _regressions(known, tags).items()})


def _preferences(task: Preferences, train: Records) -> tuple[Candidates, Candidates]:
    """The length of an answer, and logistic regression on the difference of the answers' words."""
    def texts_of(records: Records, template: str) -> list[str]:
        return [fill(template, record) for record in records]

    def by(score: Callable[[list[str]], Sequence[float]]) -> Answerer:
        def answered(records: Records) -> list[Predicted]:
            scores = [score(texts_of(records, template)) for template in both]
            return [Predicted("", record, {"row_chosen": np.array(a), "row_rejected": np.array(b)})
                    for record, a, b in zip(records, *scores, strict=True)]
        return answered

    def linear(vectors: Any, model: Any) -> Answerer:
        return by(lambda texts: vectors.transform(texts) @ model.coef_[0])

    both = task.chosen, task.rejected
    words: Candidates = {}
    for name, vectors in _vectorizers().items():
        vectors.fit([text for template in both for text in texts_of(train, template)])
        chosen, rejected = (vectors.transform(texts_of(train, template)) for template in both)
        signs = np.where(np.arange(len(train)) % 2, 1, -1)  # both classes have to occur
        x = (chosen - rejected).multiply(signs[:, None]).tocsr()
        words |= {f"logistic regression on {name}, C={c:g}": linear(vectors, model)
                  for c, model in _regressions(x, signs, fit_intercept=False).items()}
    return ({"longer answer": by(lambda texts: [len(text) for text in texts]),
             "shorter answer": by(lambda texts: [-len(text) for text in texts])}, words)


def _embeddings(task: Embeddings, train: Records) -> tuple[Candidates, Candidates]:
    """Random vectors, and the cosines of bags of words."""
    def by(vectors: Callable[[list[str]], np.ndarray]) -> Answerer:
        def answered(records: Records) -> list[Predicted]:
            pairs = zip(*(vectors([task.texts(r)[i] for r in records]) for i in (0, 1)),
                        strict=True)
            return [Predicted("", record, {"row_first": first, "row_second": second})
                    for record, (first, second) in zip(records, pairs, strict=True)]
        return answered

    vectors, rng = _vectorizers()["TF-IDF"], np.random.default_rng(0)
    vectors.fit([text for record in train for text in task.texts(record)])
    return ({"random vectors": by(lambda texts: rng.standard_normal((len(texts), 64)))},
            {"cosine of TF-IDF": by(lambda texts: vectors.transform(texts).toarray())})
