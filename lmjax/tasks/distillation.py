"""Distillation: a student learns from a teacher's predictions as well as from the targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import PathText, at_least
from lmjax.errors import UserError
from lmjax.models.layer_map import evenly
from lmjax.models.model import PROJECTION, Batch, Model
from lmjax.nn.distillation import Known, Mix, Scorer, distilled_cross_entropy, known_of
from lmjax.nn.losses import Loss
from lmjax.nn.matching import relation_divergence, state_difference
from lmjax.nn.module import Params
from lmjax.nn.packed import NOT_QUANTIZED, rounded_to
from lmjax.nn.quantized import matmuls_in
from lmjax.nn.recorded import Recorded, recording
from lmjax.sharding import Layout
from lmjax.tasks.losses import LossFn, tokens_of, with_routers
from lmjax.tasks.task import Task

IDS, LOG_P = "teacher_ids", "teacher_values"  # of a batch: [B, T * stored_tokens]
Predict = Callable[[Params, Batch, jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The `distill` group of a recipe: a teacher, and what is learned from it."""

    # The directory of a run, of a checkpoint or of a Hugging Face model; "": there is no teacher.
    teacher: PathText = ""
    hard: float = 0.5  # weight of the loss of the targets; that of the teacher's logits is 1 - hard
    temperature: float = 1.0  # divides the logits of both; above 1 it brings out unlikely tokens
    # So many tokens of the teacher's distribution are stored with each position of the training
    # data, once, before the first step: half of them the likeliest ones, half of them drawn from
    # the others; 0: the teacher computes its logits in every step.
    stored_tokens: int = 0
    # Weights of two more losses, for a teacher in the step: of the difference of the hidden states,
    # each layer's from that of an evenly chosen layer of the teacher, and of the divergence of the
    # last layers' attention.
    states: float = 0.0
    attention: float = 0.0
    relation_heads: int = 0  # of the comparison of attention; 0: as many as the student has heads

    def __post_init__(self) -> None:
        at_least(0, stored_tokens=self.stored_tokens, states=self.states,
                 attention=self.attention, relation_heads=self.relation_heads)
        if self.stored_tokens and (self.states or self.attention):
            raise UserError("0 with distill.states or distill.attention, for which the teacher "
                            "has to be in the step", self.stored_tokens, "set 0",
                            where="stored_tokens")
        if self.stored_tokens == 1:
            raise UserError("0, or at least 2: the likeliest and a drawn one", 1, "raise it",
                            where="stored_tokens")
        if not 0 <= self.hard <= 1:
            raise UserError("a share in [0, 1]", self.hard, "change it", where="hard")
        if self.temperature <= 0:
            raise UserError("more than 0", self.temperature, "raise it", where="temperature")

    @property
    def recorded(self) -> tuple[str, ...]:
        """Which arrays inside the layers are compared."""
        return ("state",) * (self.states > 0) + ("query", "key", "value") * (self.attention > 0)

    @property
    def mix(self) -> Mix:
        """How the two losses are mixed, without z_loss."""
        return Mix(self.hard, self.temperature)


class Taught(NamedTuple):
    """The parameters that the loss of a student takes."""

    student: Params
    teacher: Params | None  # None: what it predicts is in the batch


def check_task(task: Any) -> None:
    """Refuses a task whose loss is no cross-entropy of targets that a teacher has logits for.

    Raises:
      UserError: it has another loss.
    """
    if isinstance(task, Task) and not task.has_targets:
        raise UserError("a task that a teacher's logits can teach (pairs, chat, tagging, "
                        "classification of one label, or none)", task.name,
                        "leave distill.teacher out, or train on the teacher's answers",
                        where="config.distill.teacher")


def distilled_loss(student: Model, teacher: Model, config: DistillConfig, *,
                   z_loss: float = 0.0, chunk: int = 0) -> LossFn:
    """Returns the loss of `distilled_cross_entropy`, with the routers' losses.

    Its `params` are a `Taught`, or the student's where what the teacher predicts is in the batch.

    Args:
      student, teacher: the models.
      config: what is learned.
      z_loss, chunk: as for `next_token_loss`.
    """

    def loss_fn(params: Any, batch: Batch, key: jax.Array | None) -> Loss:
        params = params if isinstance(params, Taught) else Taught(params, None)
        with recording(*config.recorded) as ours:
            hidden = student.hidden(params.student, batch, key)
        with recording(*config.recorded) as theirs:
            of_teacher = (_known(batch) if config.stored_tokens
                          else scorer(teacher, params.teacher, batch))
        of_student = Scorer(*hidden[:3], student.config.output_softcap)
        loss = distilled_cross_entropy(of_student, batch["targets"], batch["loss_mask"],
                                       of_teacher, config.mix._replace(z_loss=z_loss), chunk=chunk)
        if config.recorded:
            apart = _compared(list(zip(ours, theirs, strict=True)), student, teacher, batch,
                              params.student.get(PROJECTION), config)
            loss = _with_means(loss, apart, config)
        return with_routers(loss, hidden.routing, student.config.moe, tokens_of(batch))

    return loss_fn


def as_student(student: Model, teacher: Model, config: DistillConfig, layout: Layout) -> Model:
    """The student, with a projection of its states if they are compared and narrower or wider.

    Raises:
      UserError: the attention of the models has no common relation heads, or the mesh splits the
        layers that are compared.
    """
    for axis, name in (("seq", "context"), ("layers", "stage")):
        if config.recorded and layout.on(axis):
            raise UserError("1 with distill.states or distill.attention, whose layers are "
                            "compared whole", layout.ways(axis), "set 1",
                            where=f"config.mesh.{name}")
    heads = config.relation_heads or student.config.dims.num_heads
    widths = {number * dims.head_dim for dims in (student.config.dims, teacher.config.dims)
              for number in (dims.num_heads, dims.num_kv_heads)}
    widths |= {c.num_heads * c.latent.value_dim for c in (student.config, teacher.config)
               if c.latent.kv_rank}
    if config.attention and any(width % heads for width in widths):
        raise UserError(f"a divisor of {', '.join(map(str, sorted(widths)))}, the widths of the "
                        "queries and keys of both models", heads, "change it",
                        where="config.distill.relation_heads")
    depths = student.config.num_layers, teacher.config.num_layers
    if config.states and depths[0] > depths[1]:
        raise UserError(f"at most the teacher's {depths[1]} layers, with distill.states", depths[0],
                        "lower it, or set distill.states=0", where="config.model.num_layers")
    dim = teacher.config.embed_dim
    if config.states and dim != student.config.embed_dim:
        return student.with_projection(dim)
    return student


def _compared(stacks: list[tuple[Recorded, Recorded]], student: Model, teacher: Model,
              batch: Batch, projection: jax.Array | None,
              config: DistillConfig) -> dict[str, jax.Array]:
    """The two differences of the layers, means over the stacks that the models have."""
    sides = ("encoder_", "") if len(stacks) > 1 else ("",)
    found: dict[str, list[jax.Array]] = {"teacher_states": [], "teacher_attention": []}
    for side, (ours, theirs) in zip(sides, stacks, strict=True):
        segments = batch[f"{side}segment_ids"]
        causal = student.config.family != "encoder" and not side
        if config.states:
            x, y = ours["state"], theirs["state"]
            y = y[np.array(evenly(len(x), len(y), student.config, teacher.config))]
            found["teacher_states"].append(state_difference(x, y, projection, segments > 0))
        if config.attention:
            heads = config.relation_heads or student.config.dims.num_heads
            found["teacher_attention"] += [
                relation_divergence(ours[name][-1], theirs[name][-1], heads, segments,
                                    causal=causal) for name in ("query", "key", "value")]
    return {name: jnp.mean(jnp.stack(each)) for name, each in found.items() if each}


def _with_means(loss: Loss, apart: dict[str, jax.Array], config: DistillConfig) -> Loss:
    """Adds means over tokens, which weigh as the loss does."""
    weights = {"teacher_states": config.states, "teacher_attention": config.attention}
    total = loss.total + sum(loss.weight * weights[name] * mean for name, mean in apart.items())
    more = {name: jax.lax.stop_gradient(loss.weight * mean) for name, mean in apart.items()}
    return loss._replace(total=total, extra=loss.extra | more)


def stored_fields(config: DistillConfig, fields: Mapping[str, int]) -> dict[str, int]:
    """The fields of rows with what is stored of a teacher, if the config says that it is stored."""
    width = config.stored_tokens * fields["targets"] if config.teacher else 0
    return {**fields, IDS: width, LOG_P: width} if width else dict(fields)


def predictions(teacher: Model, config: DistillConfig, vocab_size: int, chunk: int) -> Predict:
    """Returns (params, batch, numbers) -> {IDS, LOG_P}: what is stored, [B, T * stored_tokens].

    numbers: of the rows, int32 [B]; they decide what is drawn.
    """

    def predict(params: Params, batch: Batch, numbers: jax.Array) -> dict[str, jax.Array]:
        key_B = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(0), n))(numbers)
        known = known_of(scorer(teacher, params, batch), config.stored_tokens, config.temperature,
                         key_B, vocab_size=vocab_size, chunk=chunk)
        return {name: x.reshape(len(x), -1) for name, x in zip((IDS, LOG_P), known, strict=True)}

    return predict


def scorer(model: Model, params: Params, batch: Batch) -> Scorer:
    """What the logits of a teacher are computed from, in its compute dtype and without noise."""
    # train.matmul_dtype and quantization are the student's.
    with matmuls_in("auto"), rounded_to(NOT_QUANTIZED):
        hidden = model.hidden(params, batch)
    return Scorer(*hidden[:3], model.config.output_softcap)


def _known(batch: Mapping[str, jax.Array]) -> Known:
    B, T = batch["targets"].shape
    return Known(batch[IDS].reshape(B, T, -1), batch[LOG_P].reshape(B, T, -1))
