"""Reinforcement from verifiable rewards: GRPO (arXiv:2402.03300). Decoders only.

In every step the model writes `group` answers to each prompt. An answer's advantage is its reward
against the mean of its group, and every token of the answer is trained with it. A step uses the
answers of its own weights once, so the ratio of likelihoods is 1 and nothing is clipped; there is
no pull to a reference model (beta = 0).

Shape suffixes: B answers of a step, T sequence, P prompts, G answers to a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import at_least, choice
from lmjax.data.reading import Reader
from lmjax.data.rows import Rows, empty
from lmjax.errors import UserError
from lmjax.models.model import Batch, Model, ModelConfig
from lmjax.nn.losses import Loss, cross_entropy
from lmjax.nn.module import Params
from lmjax.tasks.losses import LossFn, next_token_loss, with_routers
from lmjax.tasks.pairs import Pairs
from lmjax.tasks.rewards import REWARDS
from lmjax.tasks.task import Encoded, Facts, Record, Sizes

# grpo: the mean over answers of the mean over an answer's tokens. dapo: the mean over all tokens
# (arXiv:2503.14476). dr_grpo: the sum over max_tokens, and advantages without a division by the
# standard deviation (arXiv:2503.20783).
KINDS = ("grpo", "dapo", "dr_grpo")
ADVANTAGES, REWARD = "values", "label_values"  # columns that a step fills
LEAST_DEVIATION = 1e-4  # is added to the standard deviation of a group's rewards


@dataclass(frozen=True)
class Grpo(Pairs):
    """Which answers earn a reward."""

    name: str = "grpo"
    metric: str = "exact_match"
    kind: str = "grpo"  # grpo, dapo or dr_grpo
    group: int = 8  # answers to a prompt
    temperature: float = 1.0  # of their sampling
    # What an answer earns: the weights of exact_match (it is the target), number (its last number
    # is the target's), pattern (it has the form of `pattern`), or of your own in `REWARDS`.
    rewards: dict[str, float] = field(default_factory=lambda: {"exact_match": 1.0})
    pattern: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("kind", self.kind, KINDS)
        at_least(2, group=self.group)
        if not self.rewards or not self.temperature > 0:
            raise UserError("one or more rewards and a temperature above 0",
                            f"{self.rewards}, {self.temperature}", "correct them", where="rewards")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError("a regular expression", f"{self.pattern!r} ({error})", "correct it",
                            where="pattern") from None

    def check_installed(self) -> None:
        super().check_installed()
        # Here and not where the config is made: a checkpoint loads without a reward of one's own.
        for name in self.rewards:
            choice("config.task.rewards", name, REWARDS)

    @property
    def packs(self) -> bool:
        return False

    @property
    def whole_batch(self) -> bool:
        return self.kind == "dapo"  # which counts the tokens of all answers

    def room(self, sizes: Sizes) -> int:
        if self.max_tokens >= sizes.tokens:
            raise UserError(f"less than data.seq_len={sizes.tokens}, which holds a prompt and an "
                            "answer", self.max_tokens, "lower it", where="config.task.max_tokens")
        return sizes.tokens + 1 - self.max_tokens  # the last id is only a target

    @property
    def samples(self) -> int:
        return self.group

    def check(self, model: ModelConfig) -> None:
        if model.family != "decoder":
            raise UserError("a decoder", model.family, "use one", where="task.name")

    def decides(self) -> dict[str, Any]:
        decided = super().decides()
        of_steps = ("kind", "group", "temperature", "rewards", "pattern")
        return {key: value for key, value in decided.items() if key not in of_steps}

    def length_of(self, side: str, sizes: Sizes, facts: Facts) -> int:
        return 1 if side == "label_" else super().length_of(side, sizes, facts)

    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        made = super().encode(record, reader, facts, sizes, labelled=labelled)
        n = len(made.columns["tokens"])
        return made._replace(columns={**made.columns, ADVANTAGES: np.zeros(n, np.float32),
                                      REWARD: np.zeros(1, np.float32)})

    def reward(self, answer: str, target: str) -> float:
        """What an answer earns."""
        return sum(weight * REWARDS[name](answer, target, self.pattern)
                   for name, weight in self.rewards.items())

    @property
    def has_targets(self) -> bool:
        return False

    def loss(self, model: Model, facts: Facts, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
        def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
            hidden = model.hidden(params, batch, key)
            # The gradient of advantage * ratio, where the ratio is 1, is that of
            # advantage * log likelihood: a cross-entropy with advantages for weights.
            weights_BT = batch[ADVANTAGES] * token_weights(batch["loss_mask"], self)
            # Of the distribution that the answers were drawn from: logits over the temperature.
            scale = 1.0 / self.temperature
            bias_V = None if hidden.bias_V is None else hidden.bias_V * scale
            of_gradient = cross_entropy(
                hidden.x_BTD * scale, hidden.table_VD, batch["targets"], weights_BT, bias_V=bias_V,
                softcap=model.config.output_softcap * scale, chunk=chunk).total
            value = -jnp.sum(weights_BT)
            total = value + of_gradient - jax.lax.stop_gradient(of_gradient)
            real_B = jnp.max(batch["loss_mask"], axis=1)
            loss = Loss(total, jax.lax.stop_gradient(value), jnp.sum(real_B),
                        {"reward": jnp.sum(batch[REWARD])})
            return with_routers(loss, hidden.routing, model.config.moe, real_B)

        return loss_fn

    def eval_loss(self, model: Model, facts: Facts) -> LossFn:
        loss_fn = next_token_loss(model)  # of the right answers
        return lambda params, batch, key: loss_fn(params, batch, key)._replace(extra={})


def token_weights(mask_BT: jax.Array, task: Grpo) -> jax.Array:
    """What each token of an answer weighs, so that the sum over a batch is a sum over answers."""
    tokens_B1 = jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1.0)
    if task.kind == "grpo":
        return mask_BT / tokens_B1
    if task.kind == "dr_grpo":
        return mask_BT / task.max_tokens
    answers = jnp.sum(jnp.max(mask_BT, axis=1))
    return mask_BT * answers / jnp.maximum(jnp.sum(mask_BT), 1.0)


def advantages(rewards_PG: np.ndarray, kind: str) -> np.ndarray:
    """The rewards against the mean of their group, float32 [P, G]."""
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if kind == "dr_grpo":
        return centred_PG.astype(np.float32)
    deviation_P1 = rewards_PG.std(axis=1, ddof=1, keepdims=True)
    return (centred_PG / (deviation_P1 + LEAST_DEVIATION)).astype(np.float32)


def prompts_of(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """The ids of each row's prompt, and of its right answer with the end."""
    found = []
    for tokens, targets, mask in zip(rows["tokens"], rows["targets"], rows["loss_mask"],
                                     strict=True):
        at = np.flatnonzero(mask)
        found.append((tokens[: at[0] + 1].tolist(), targets[at].tolist()))
    return found


def answered_rows(fields: dict[str, int], prompts: Sequence[Sequence[int]],
                  answers: Sequence[Sequence[int]], advantages_B: np.ndarray,
                  rewards_B: np.ndarray) -> Rows:
    """The rows of a step: each prompt with its answer, of which every token has its advantage.

    Args:
      fields: the arrays of a batch, and the length of their rows.
      prompts: ids, one list per row.
      answers: likewise, with the end where the model wrote it.
      advantages_B, rewards_B: of the answers.
    """
    rows = empty(fields, len(prompts))
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = np.array([*prompt, *answer], np.int32)
        n, first = len(ids) - 1, len(prompt) - 1
        rows["tokens"][i, :n], rows["targets"][i, :n] = ids[:-1], ids[1:]
        rows["positions"][i, :n], rows["segment_ids"][i, :n] = np.arange(n), 1
        rows["loss_mask"][i, first:n] = 1
        rows[ADVANTAGES][i, first:n] = advantages_B[i]
        if "bidirectional" in rows:
            rows["bidirectional"][i, : len(prompt)] = 1
        rows[REWARD][i] = rewards_B[i]
    return rows
