"""Preferences: of two answers to a prompt, one is better. Decoders only.

    dpo     arXiv:2305.18290, against the model that the run starts from; with label smoothing cDPO
    ipo     arXiv:2310.12036, with likelihoods per token as the reference implementations have it
    orpo    arXiv:2403.07691, without a reference model
    reward  a head that scores an answer at its last token (Bradley-Terry)

The log-likelihoods of the reference model are computed once, before the first step, and stored with
the examples (`training/reference.py`).

Shape suffixes: B pairs, T sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import choice
from lmjax.data.reading import Reader
from lmjax.errors import UserError
from lmjax.models.heads import HeadConfig
from lmjax.models.model import Batch, Model, ModelConfig
from lmjax.nn.losses import Loss, row_log_likelihoods
from lmjax.nn.module import Params
from lmjax.nn.routing import Routing
from lmjax.tasks.losses import LossFn, with_routers
from lmjax.tasks.task import Answer, Encoded, Facts, Predicted, Record, Sizes, Task
from lmjax.tasks.templates import check_template, fill
from lmjax.tasks.writing import prompt_and_target, prompt_ids

KINDS = ("dpo", "ipo", "orpo", "reward")
REJECTED = "rejected_"  # the prefix of the columns of the worse answer
REFERENCE = "label_values"  # the column of the reference's log-likelihoods: chosen, rejected


class Pair(NamedTuple):
    """What a model gives to the answers of each pair, float32 [B] each."""

    chosen_B: jax.Array
    rejected_B: jax.Array
    routing: Routing | None  # how experts were chosen


@dataclass(frozen=True)
class Preferences(Task):
    """Which of two answers is better."""

    name: str = "preferences"
    prompt: str = "{prompt}"
    chosen: str = "{chosen}"  # the better answer
    rejected: str = "{rejected}"  # the worse answer
    separator: str = "\n"  # between the prompt and an answer
    kind: str = "dpo"  # dpo, ipo, orpo or reward
    beta: float = 0.1  # dpo, ipo: strength of the pull to the reference; orpo: weight of the odds
    label_smoothing: float = 0.0  # dpo: the share of pairs that may be labelled the wrong way

    def __post_init__(self) -> None:
        choice("kind", self.kind, KINDS)
        for key, template in self.templates.items():
            check_template(template, key)
        if not self.beta > 0:
            raise UserError("more than 0", self.beta, "0.1 is usual", where="beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError("a share in [0, 0.5)", self.label_smoothing, "lower it",
                            where="label_smoothing")

    @property
    def packs(self) -> bool:
        return False

    @property
    def needs_reference(self) -> bool:
        return self.kind in ("dpo", "ipo")

    @property
    def measures(self) -> tuple[str, ...]:
        return ("accuracy", "margin")

    @property
    def templates(self) -> dict[str, str]:
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}

    def decides(self) -> dict[str, Any]:
        plain = super().decides()
        return {key: plain[key] for key in plain if key not in ("beta", "label_smoothing")}

    def check_installed(self) -> None:
        """Its metrics need no package."""

    def check(self, model: ModelConfig) -> None:
        if model.family != "decoder":
            raise UserError("a decoder", model.family, "use one", where="task.name")

    def texts(self, record: Record) -> list[str]:
        return [fill(template, record) for template in self.templates.values()]

    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        answers = [fill(template, record).strip() for template in (self.chosen, self.rejected)]
        if not all(answers) or answers[0] == answers[1]:
            raise UserError("two answers", "the same one twice" if all(answers) else "an empty one",
                            "leave the record out")
        # Both answers follow the same ids. The prompt is cut first; an answer loses tokens only
        # where it is long as well: it has half of the row, or what the prompt leaves.
        given, targets = fill(self.prompt, record), [reader.names.encode(a) for a in answers]
        whole, _ = prompt_ids(reader, given, self.separator, sizes.tokens)
        longest = min(max(map(len, targets)), max(sizes.tokens // 2, sizes.tokens - len(whole)))
        prompt = prompt_ids(reader, given, self.separator, sizes.tokens - longest)
        both = [prompt_and_target(reader, prompt, target, sizes) for target in targets]
        columns: dict[str, np.ndarray] = {}
        for prefix, encoded in zip(("", REJECTED), both, strict=True):
            its = dict(encoded.columns)
            if self.kind == "reward":  # read at the last token
                del its["targets"]
                its["loss_mask"] = np.eye(1, len(its["tokens"]), len(its["tokens"]) - 1,
                                          dtype=np.int32)[0]
            columns |= {f"{prefix}{name}": values for name, values in its.items()}
        return Encoded(columns, prompt[1], cut_target=sum(its.cut_target for its in both))

    def length_of(self, side: str, sizes: Sizes, facts: Facts) -> int:
        return 2 if side == "label_" else sizes.tokens

    def head(self, model: ModelConfig, facts: Facts) -> HeadConfig:
        return HeadConfig(1, "plain") if self.kind == "reward" else HeadConfig()

    @property
    def has_targets(self) -> bool:
        return False

    def loss(self, model: Model, facts: Facts, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
        def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
            real_B = (batch["segment_ids"][:, 0] > 0).astype(jnp.float32)
            if self.kind == "reward":
                chosen_B, rejected_B, routing = rewards(model, params, batch, key)
                each_B = -jax.nn.log_sigmoid(chosen_B - rejected_B)
            else:
                found = log_likelihoods(model, params, batch, chunk=chunk)
                each_B, chosen_B, rejected_B = self._each(found, batch, real_B)
                routing = found.routing
            total = jnp.sum(jnp.where(real_B > 0, each_B, 0.0))
            loss = Loss(total, jax.lax.stop_gradient(total), jnp.sum(real_B))
            if key is not None:
                return with_routers(loss, routing, model.config.moe, jnp.repeat(real_B / 2, 2))
            return loss._replace(extra={"row_chosen": chosen_B, "row_rejected": rejected_B})

        return loss_fn

    def _each(self, found: Pair, batch: Batch,
              real_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The loss of each pair, and the rewards of its answers."""
        chosen_B, rejected_B, _ = found
        lengths = [jnp.maximum(jnp.sum(batch[f"{prefix}loss_mask"], axis=1), 1.0)
                   for prefix in ("", REJECTED)]
        if self.kind == "orpo":
            # An empty row has the likelihood 1, whose odds are infinite.
            a_B, b_B = (jnp.where(real_B > 0, x_B / length_B, -1.0)
                        for x_B, length_B in zip((chosen_B, rejected_B), lengths, strict=True))
            odds_B = (a_B - b_B) - (jnp.log1p(-jnp.exp(a_B)) - jnp.log1p(-jnp.exp(b_B)))
            return -a_B - self.beta * jax.nn.log_sigmoid(odds_B), a_B, b_B
        # Records that are only to be answered have no reference: then likelihoods decide.
        reference_B2 = batch.get(REFERENCE, jnp.zeros((len(chosen_B), 2)))
        a_B, b_B = chosen_B - reference_B2[:, 0], rejected_B - reference_B2[:, 1]
        if self.kind == "ipo":
            a_B, b_B = a_B / lengths[0], b_B / lengths[1]
            each_B = jnp.square(a_B - b_B - 1 / (2 * self.beta))
        else:
            z_B, smooth = self.beta * (a_B - b_B), self.label_smoothing
            each_B = -(1 - smooth) * jax.nn.log_sigmoid(z_B) - smooth * jax.nn.log_sigmoid(-z_B)
        return each_B, self.beta * a_B, self.beta * b_B

    def answer(self, predicted: Predicted, facts: Facts) -> Answer:
        chosen, rejected = (float(predicted.arrays[f"row_{name}"])
                            for name in ("chosen", "rejected"))
        return {"label": "chosen" if chosen > rejected else "rejected",
                "confidence": float(1 / (1 + np.exp(-abs(chosen - rejected)))),
                "chosen": chosen, "rejected": rejected}

    def truth(self, record: Record) -> Any:
        return "chosen"

    def metrics(self, predicted: Sequence[Predicted], facts: Facts) -> dict[str, float]:
        chosen, rejected = (np.array([float(p.arrays[f"row_{name}"]) for p in predicted])
                            for name in ("chosen", "rejected"))
        return {"accuracy": float(np.mean(chosen > rejected)),
                "margin": float(np.mean(chosen - rejected))}


def log_likelihoods(model: Model, params: Params, batch: Batch, *, chunk: int = 0) -> Pair:
    """The log-likelihoods of the better and of the worse answers, in nats.

    Without dropout, as those of the reference: noise would count as a difference from it.
    """
    both = _both(batch)
    hidden = model.hidden(params, both)
    sums = row_log_likelihoods(hidden.x_BTD, hidden.table_VD, both["targets"], both["loss_mask"],
                               bias_V=hidden.bias_V, softcap=model.config.output_softcap,
                               chunk=chunk).reshape(-1, 2)
    return Pair(sums[:, 0], sums[:, 1], hidden.routing)


def rewards(model: Model, params: Params, batch: Batch, key: jax.Array | None) -> Pair:
    """What a head of one output gives to the better and to the worse answers."""
    both = _both(batch)
    hidden = model.hidden(params, both, key)
    scores_NT = model.logits_of(hidden)[..., 0]
    sums = jnp.sum(scores_NT * both["loss_mask"], axis=1).reshape(-1, 2)
    return Pair(sums[:, 0], sums[:, 1], hidden.routing)


def _both(batch: Batch) -> Batch:
    """Rows of both answers, [2B, T]: those of a pair are neighbours, and stay on their device."""
    names = [name.removeprefix(REJECTED) for name in batch if name.startswith(REJECTED)]
    return {name: jnp.stack([batch[name], batch[REJECTED + name]], axis=1).reshape(
        -1, batch[name].shape[1]) for name in names}
