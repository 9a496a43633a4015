"""A loaded model that has a task: the methods of `lmjax.lm.LM` that answer its examples."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lmjax import huggingface
from lmjax.data.reading import Reader
from lmjax.data.tokenizers import Tokenizer
from lmjax.decoding.generate import Generator
from lmjax.decoding.inputs import check_texts
from lmjax.errors import UserError
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout
from lmjax.tasks.predicting import Predictor
from lmjax.tasks.published import exported_head
from lmjax.tasks.questions import Questions
from lmjax.tasks.tagging import Tagging
from lmjax.tasks.task import Facts, Task
from lmjax.training.checkpoint import About
from lmjax.training.recipe import Recipe
from lmjax.training.task_data import sizes_of


def task_of(recipe: Recipe, about: About,
            tokenizer: Tokenizer | None) -> tuple[Task, Facts, Tokenizer]:
    """The task of a model with what it kept of its training examples, and its tokenizer.

    Raises:
      UserError: it has no task, or no tokenizer.
    """
    if not isinstance(recipe.task, Task) or "task" not in about:
        raise UserError("a model that was trained for a task", "one without", "train one with "
                        "config.task, or use lm.generate, lm.score or lm.embed")
    return recipe.task, about["task"], tokenizer_of(tokenizer)


def tokenizer_of(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
      UserError: it has none.
    """
    if tokenizer is None:
        raise UserError("a model with a tokenizer",
                        "one of synthetic data, or imported without tokenizer.model and "
                        "tokenizer.json", "use lm.logits(ids), or write tokenizer.json with "
                        "AutoTokenizer of transformers (save_pretrained) and load again")
    return tokenizer


class TaskModel:
    """A model with its parameters and its tokenizer; `LM` says what the attributes are."""

    model: Model
    params: Params
    layout: Layout
    tokenizer: Tokenizer | None
    reader: Reader
    recipe: Recipe
    about: About
    _generator: Generator

    def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answers examples of the task that the model was trained for.

        An answer does not depend on the other records.

        Args:
          records: with the columns that `config.task` names; nothing of what is to be predicted.

        Returns:
          One answer per record, as in the files of WORKDIR/answers: {"label": ..., "confidence":
          ...} of a classification, for example.

        Raises:
          UserError: a record lacks a column, or the model has no task.
        """
        predictor = self.predictor
        return predictor.answers(self.params, [
            predictor.example(record, f"records[{i}]") for i, record in enumerate(records)])

    def classify(self, texts: Sequence[str],
                 pairs: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Classifies texts, or pairs of texts.

        Args:
          texts: what the column of `config.task.input` holds.
          pairs: per text, the second text that the model reads after it.

        Returns:
          Per text, {"label", "confidence", "probabilities": of every class}; {"labels",
          "probabilities"} if there may be several; of a regression {"value"}.

        Raises:
          UserError: the model was trained for no classification, or for one of several columns.
        """
        return self.predictor.classify(self.params, check_texts(texts, "texts"),
                                       None if pairs is None else check_texts(pairs, "pairs"))

    def tag(self, texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """Gives every word of texts a tag.

        Args:
          texts: per text, a list of its words.

        Returns:
          Per text, {"words", "tags", "confidence": one per word}, and with IOB2 tags "entities",
          each with text, label, first word (start), the word after the last (end) and confidence. A
          word that did not fit into the model's rows has the tag None.

        Raises:
          UserError: the model was trained for no tagging, or a text is no list of words.
        """
        task = self.predictor.task
        if not isinstance(task, Tagging):
            raise UserError("a model that tags words", f"one for the task {task.name}",
                            "use lm.predict(records)")
        return self.predict([{task.tokens: check_texts(words, f"texts[{i}]")}
                             for i, words in enumerate(texts)])

    def answer(self, questions: Sequence[str], contexts: Sequence[str]) -> list[dict[str, Any]]:
        """Answers questions by parts of texts.

        Args:
          questions: the questions.
          contexts: per question, the text in which its answer stands.

        Returns:
          Per question, {"text", "start", "end": characters of the context, "confidence", "best":
          the likeliest answers}. Where the context has no answer, "text" is "" and there is no
          place.

        Raises:
          UserError: the model was trained for no questions, or there is not one text per question.
        """
        task = self.predictor.task
        if not isinstance(task, Questions):
            raise UserError("a model that answers questions", f"one for the task {task.name}",
                            "use lm.predict(records)")
        asked, read = check_texts(questions, "questions"), check_texts(contexts, "contexts")
        if len(asked) != len(read):
            raise UserError(f"{len(asked)} texts, one per question", len(read), "pass them",
                            where="contexts")
        return self.predict([{task.question: question, task.context: context}
                             for question, context in zip(asked, read, strict=True)])

    @functools.cached_property
    def predictor(self) -> Predictor:
        """Answers examples of the model's task.

        Raises:
          UserError: it has none, or no tokenizer.
        """
        task, facts, _ = task_of(self.recipe, self.about, self.tokenizer)
        return Predictor(task, facts, self.model, self.layout, self.reader, sizes_of(self.recipe),
                         self._generator)

    def task_head(self) -> huggingface.TaskHead | None:
        """What an export says of the head of the model's task; None without one.

        Raises:
          UserError: `transformers` has no class for the task.
        """
        head = self.model.config.head
        if not head.outputs:
            return None
        return exported_head(self.recipe.task, self.about.get("task", {}), head)

    def need_vocabulary(self) -> None:
        """Checks that the model scores its vocabulary.

        Raises:
          UserError: it has the head of a task in place of its unembedding.
        """
        if self.model.config.head.outputs:
            raise UserError("a model that scores its vocabulary", "one with the head of the task "
                            f"{self.recipe.task.name or 'that it was trained for'}",
                            "use lm.predict(records)")

    def need_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer.

        Raises:
          UserError: the model has none.
        """
        return tokenizer_of(self.tokenizer)
