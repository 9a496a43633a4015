"""lm-eval's tasks on a model of ours, in process: `lmjax eval CKPT --tasks hellaswag,...`.

Needs the extra `eval`. A result does not depend on the order or number of the requests: rows of the same padded
length run through one compiled program whose rows do not see each other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmjax.lm import LM

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ValueError("lmjax eval: expected the package lm-eval, got none; pip install 'lmjax[eval]'") from error

MAX_NEW_TOKENS = 256  # lm-eval's own default
ROWS = 16  # answers generated at a time


class EvalModel(TemplateLM):
    """A model of ours behind lm-eval's interface."""

    def __init__(self, lm: LM):
        super().__init__()
        self.lm, self.max_length = lm, lm.recipe.data.seq_len
        self.tokens = lm.need_tokenizer()

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in for an empty context."""
        return self.tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, by default with what the tokenizer puts in front of a text."""
        ids = self.tokens.encode(string)
        return ids if add_special_tokens is False else [*self.tokens.prefix, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                              **kwargs: Any) -> list[tuple[float, bool]]:
        if long := [len(continuation) for *_, continuation in requests if len(continuation) > self.max_length]:
            raise ValueError(f"expected continuations of at most data.seq_len={self.max_length} tokens, got one of "
                             f"{max(long)}; use tasks with shorter answers or a model of longer rows")
        # As much of the context as there is room for; the continuation's last token is only predicted.
        kept = [(both[-self.max_length - 1:], len(continuation)) for both, continuation in
                (([*context, *continuation], continuation) for _, context, continuation in requests)]
        return self.lm.continuations(kept)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token once, in windows of the model's length."""
        windows = [(i, *make_disjoint_window(window)) for i, request in enumerate(requests)
                   for window in get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                           self.max_length, 1)]
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([(None, context, rest) for _, context, rest in windows])
        for (i, *_), (value, _) in zip(windows, scores, strict=True):
            sums[i] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first stop string, greedy unless the task asks for sampling."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        answers = [""] * len(requests)
        for members in groups.values():
            settings = requests[members[0]].args[1]
            until = settings.get("until") or []
            count = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
            if count >= self.max_length:
                raise ValueError(f"max_gen_toks: expected less than the model's {self.max_length} positions, got "
                                 f"{count}; lower it in the task's generation_kwargs")
            sampled = settings.get("do_sample", False)
            for at in range(0, len(members), ROWS):
                part = members[at : at + ROWS]
                ids = [self.tok_encode(requests[i].args[0])[-(self.max_length - count):] for i in part]
                texts = self.lm.generate_ids(
                    ids, max_tokens=count, temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
                    stop=[until] if isinstance(until, str) else until)
                for i, text in zip(part, texts, strict=True):
                    answers[i] = text
        return answers


def evaluate_tasks(lm: LM, tasks: Sequence[str], *, task_dir: str = "", num_fewshot: int | None = None,
                   limit: int | None = None) -> dict[str, Any]:
    """lm-eval's results, `{task: {metric: value}}`.

    task_dir: a directory of task files (YAML) besides lm-eval's own; tasks on local data need no network.

    Raises:
      ValueError: no such task.
    """
    if task_dir and not Path(task_dir).is_dir():
        raise ValueError(f"--task-dir: expected a directory of task files, got {task_dir!r}; correct it")
    manager = TaskManager(include_path=task_dir or None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"--tasks: expected tasks of lm-eval or of --task-dir, got {', '.join(unknown)}; correct them")
    found = lm_eval.simple_evaluate(model=EvalModel(lm), tasks=list(tasks), num_fewshot=num_fewshot, limit=limit,
                                    task_manager=manager, bootstrap_iters=0)
    return {task: {name: value for name, value in metrics.items() if isinstance(value, float | int)}
            for task, metrics in found["results"].items()}
