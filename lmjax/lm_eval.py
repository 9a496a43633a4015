"""Runs lm-eval's tasks on a model, in this process: `lmjax eval CHECKPOINT --tasks hellaswag,...`.

Needs the extra `eval`. A result does not depend on the order or the number of requests: rows of the
same padded length run through one compiled program, in which rows do not see each other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmjax.errors import UserError
from lmjax.lm import LM

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if error.name != "lm_eval":  # a module that lm-eval lacks, or this file in place of lm-eval
        raise
    raise UserError("the package lm-eval", "none", "pip install 'lmjax[eval]'",
                    where="lmjax eval") from error

MAX_NEW_TOKENS = 256  # lm-eval's own default
ROWS = 16  # answers generated together


class EvalModel(TemplateLM):
    """Offers an `lmjax.LM` through lm-eval's interface for models."""

    def __init__(self, lm: LM):
        super().__init__()
        self.lm, self.max_length = lm, lm.recipe.data.seq_len
        self.tokens = lm.need_tokenizer()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands in for an empty context."""
        return self.tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                   **kwargs: Any) -> list[int]:
        """Returns token ids, by default after those that begin a text in the model's training."""
        ids = self.tokens.encode(string)
        return ids if add_special_tokens is False else [*self.lm.reader.prefix, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                              **kwargs: Any) -> list[tuple[float, bool]]:
        limit = self.max_length
        if long := [len(answer) for *_, answer in requests if len(answer) > limit]:
            raise UserError(f"continuations of at most data.seq_len={limit} tokens",
                            f"one of {max(long)}",
                            "use tasks with shorter answers or a model with longer rows")
        # The last token of a continuation is only predicted, so a row has one token more than fit.
        # A context of spaces alone may have no tokens.
        return self.lm.continuations([
            ([*(context or [self.prefix_token_id]), *answer][-limit - 1 :], len(answer))
            for _, context, answer in requests])

    def loglikelihood_rolling(self, requests: list[Instance],
                              disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihoods of whole texts, in windows that predict each token once."""
        windows = []
        for i, request in enumerate(requests):
            # BOS is the first token's context: no model was trained to predict it.
            # As `lm.score`: names of special tokens are plain text in a document.
            ids = self.tokens.encode_batch([request.args[0]])[0].tolist()
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(i, *make_disjoint_window(window)) for window in rolling]
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([(None, context, rest) for _, context, rest in windows])
        for (i, *_), (value, _) in zip(windows, scores, strict=True):
            sums[i] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates answers up to the first stop string, greedily unless the task samples."""
        groups: dict[str, list[int]] = {}  # requests with the same settings
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        answers = [""] * len(requests)
        for members in groups.values():
            # Contexts of like length share a batch: the shorter ones are padded.
            members.sort(key=lambda i: len(requests[i].args[0]))
            for at in range(0, len(members), ROWS):
                part = members[at : at + ROWS]
                contexts = [requests[i].args[0] for i in part]
                texts = self._generate(contexts, requests[part[0]].args[1])
                for i, text in zip(part, texts, strict=True):
                    answers[i] = text
        return answers

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """Answers several contexts with a task's `generation_kwargs`."""
        count = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        if count >= self.max_length:
            raise UserError(f"less than the model's {self.max_length} positions", count,
                            "lower it in the task's generation_kwargs", where="max_gen_toks")
        until = settings.get("until") or []
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        whole = self.lm.model.config.family == "encdec"
        return self.lm.generate_ids(
            [self.lm.reader.ids(context, end=whole)[-(self.max_length - count) :]
             for context in contexts],
            max_tokens=count, temperature=float(temperature),
            stop=[text for text in ([until] if isinstance(until, str) else until) if text])


def check_tasks(tasks: Sequence[str], task_dir: str = "") -> TaskManager:
    """Returns what finds the tasks; the arguments are those of `evaluate_tasks`.

    Raises:
      UserError: there is no such task or directory.
    """
    if task_dir and not Path(task_dir).is_dir():
        raise UserError("a directory of task files", repr(task_dir), "correct it",
                        where="--task-dir")
    manager = TaskManager(include_path=task_dir or None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError("tasks of lm-eval or of --task-dir", ", ".join(unknown), "correct them",
                        where="--tasks")
    return manager


def evaluate_tasks(lm: LM, tasks: Sequence[str], *, task_dir: str = "",
                   num_fewshot: int | None = None, limit: int | None = None) -> dict[str, Any]:
    """Runs tasks of lm-eval.

    Args:
      lm: the model.
      tasks: names of tasks.
      task_dir: a directory with more task files (YAML); tasks on local data need no network.
      num_fewshot: examples in the prompt; None leaves it to the task.
      limit: examples per task; None takes all.
    Returns:
      `{task: {metric: value}}`.
    Raises:
      UserError: there is no such task or directory, or a task needs longer rows than the model has.
    """
    manager = check_tasks(tasks, task_dir)
    found = lm_eval.simple_evaluate(
        model=EvalModel(lm), tasks=list(tasks), num_fewshot=num_fewshot, limit=limit,
        task_manager=manager, bootstrap_iters=0)
    return {task: {name: value for name, value in metrics.items() if isinstance(value, float | int)}
            for task, metrics in found["results"].items()}
