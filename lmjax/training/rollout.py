"""Batches that a model writes itself: prompts of the data, its answers, and what they earn."""

import numpy as np

from lmjax.data.batches import local_rows, to_global
from lmjax.decoding.reading import generator_of
from lmjax.decoding.sampling import Sampling
from lmjax.models.model import Batch
from lmjax.nn.module import Params
from lmjax.tasks.grpo import Grpo, advantages, answered_rows, prompts_of
from lmjax.tasks.writing import target_end
from lmjax.training.run import Run


def rollout(run: Run, params: Params, step: int) -> Batch:
    """Writes answers to the prompts of a step, and makes the batch that trains on them.

    The batch is a function of the weights and of the step's number, so a resumed run writes the
    same answers. Every process writes all of them and places its own rows.

    Args:
      run: its task is `grpo`.
      params: the model's, before the step.
      step: from 1.
    """
    task, size = run.recipe.task, run.recipe.train.batch_size
    assert isinstance(task, Grpo)
    first, last = (row // task.group for row in run.steps.of(step))
    pairs = prompts_of(run.train_split.rows(np.arange(first, last)))
    prompts = [prompt for prompt, _ in pairs for _ in range(task.group)]
    end, decode = target_end(run.reader), run.reader.names.decode
    # Only the id that is trained ends an answer, whatever else ends the answers of the model.
    writer = generator_of(run.model, run.layout, run.reader._replace(end_ids=(end,)))
    answers = writer(params, prompts, max_tokens=task.max_tokens, seed=step,
                     sampling=Sampling(temperature=task.temperature))
    targets = [decode(target[:-1]) for _, target in pairs]
    rewards = np.array([task.reward(decode(answer), targets[i // task.group])
                        for i, answer in enumerate(answers)])
    whole = [answer if len(answer) == task.max_tokens else [*answer, end] for answer in answers]
    per_prompt = advantages(rewards.reshape(-1, task.group), task.kind)
    rows = answered_rows(run.train_split.fields, prompts, whole, per_prompt.reshape(-1), rewards)
    sharding = run.layout.sharding(("batch", "seq"))
    local = local_rows((size, run.train_split.fields["tokens"]), sharding)
    return to_global({name: values[local] for name, values in rows.items()}, size, sharding, local)
