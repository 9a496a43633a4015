"""Programs: what `lmjax train` runs and `lmjax plan` compiles, made out of a recipe and devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.data.rows import dtype_of
from lmjax.errors import UserError
from lmjax.models.model import Batch, Model, ModelConfig, build_model
from lmjax.models.parametrization import optimizer_factors
from lmjax.nn.losses import Loss
from lmjax.nn.module import Params
from lmjax.nn.packed import NOT_QUANTIZED, Quantization, rounded_to
from lmjax.nn.quantized import check_matmul_dtype, matmuls_in
from lmjax.sharding import Layout, MeshConfig, make_layout
from lmjax.tasks.distillation import as_student, distilled_loss
from lmjax.tasks.losses import LossFn, next_token_loss
from lmjax.tasks.task import Facts, Task
from lmjax.training.frozen import frozen_in
from lmjax.training.optim.groups import multipliers
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.optim.table import make_optimizer
from lmjax.training.pruning import gradual_pruning
from lmjax.training.recipe import Recipe
from lmjax.training.state import StateSpec, state_spec
from lmjax.training.step import LIMITS, make_eval_step, make_train_step
from lmjax.tree import split_tree


class Program(NamedTuple):
    """The pure part of a run: no data, no files, not a single array."""

    layout: Layout
    model: Model
    spec: StateSpec
    # The train step for the devices of the mesh, which need not exist: `traced.lower().compile()`.
    traced: jax.stages.Traced
    eval_fn: Callable[[Params, Batch], Loss]
    batch: dict[str, jax.ShapeDtypeStruct]  # the arrays [B, T] of a training batch, with shardings
    # The loss that the step minimises, of `model` or of one that computes the same in another way.
    loss_of: Callable[[Model], LossFn]
    # Traces the step that also gives the statistics of `training.statistics`.
    trace_with_statistics: Callable[[], jax.stages.Traced]


def make_program(recipe: Recipe, devices: Sequence[jax.Device], *, vocab_size: int,
                 fields: Mapping[str, int], facts: Facts | None = None,
                 teacher: ModelConfig | None = None) -> Program:
    """Makes the program of `recipe` over `devices`.

    Args:
      recipe: what to train, and how.
      devices: real ones, or those of a described topology (`jax.experimental.topologies`).
      vocab_size: of the data.
      fields: name -> length of a row, for each array of a batch; the objective or the task
        decides them.
      facts: what a task keeps of its training examples; None without a task.
      teacher: the model of distill.teacher; None without one.

    Raises:
      UserError: the mesh does not fit the devices, the model, its activations or the batch, or no
        kernel can serve the model.
    """
    train = recipe.train
    layout = make_layout(recipe.mesh, devices)
    model = make_model(recipe, layout, vocab_size=vocab_size, facts=facts)
    taught_by = None if teacher is None else make_teacher(recipe, layout, teacher)
    if taught_by is not None:
        model = as_student(model, taught_by, recipe.distill, layout)
    schedule = make_schedule(recipe.optimizer, train.steps)
    frozen = frozen_in(recipe, model)
    trained = model.axes if frozen is None else split_tree(model.axes, frozen.accepts)[1]
    factors = optimizer_factors(model.config, recipe.optimizer.name, model.shapes, model.axes)
    tx = make_optimizer(recipe.optimizer, train.steps, trained,
                        multipliers(recipe.optimizer, model.shapes, model.axes, factors),
                        factors=factors,
                        keep_zeros=train.keep_zeros or recipe.pruning.weights > 0)
    if recipe.pruning.weights:
        tx = optax.chain(tx, gradual_pruning(recipe.pruning, train.steps, model.functional))
    in_step = None if recipe.distill.stored_tokens else taught_by
    spec = state_spec(model, tx, layout, ema=recipe.optimizer.ema_decay > 0, frozen=frozen,
                      teacher=in_step)
    _check_batch(recipe, layout)
    if not model.config.head.outputs:  # a task has few classes, which need not be split
        layout.spec(("act_vocab",), (model.config.vocab_size,))
    loss_fn, eval_loss = _losses(recipe, model, facts, taught_by)
    make_step = functools.partial(
        make_train_step, loss_fn, spec, layout, schedule, seed=train.seed,
        microbatches=train.microbatches, ema_decay=recipe.optimizer.ema_decay)
    sharding = layout.sharding(("batch", "seq"))
    batch = {name: jax.ShapeDtypeStruct((train.batch_size, length), dtype_of(name),
                                        sharding=sharding) for name, length in fields.items()}
    limits = {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=layout.replicated)
              for name in LIMITS if recipe.watch.spikes == "skip"}
    return Program(layout, model, spec, make_step().trace(spec.shapes, batch | limits),
                   make_eval_step(eval_loss, layout, train.microbatches), batch,
                   lambda model: _losses(recipe, model, facts, taught_by)[0],
                   lambda: make_step(statistics=True).trace(spec.shapes, batch | limits))


def make_model(recipe: Recipe, layout: Layout, *, vocab_size: int,
               facts: Facts | None = None) -> Model:
    """Makes the model of `recipe` for the devices of `layout` and data of `vocab_size` tokens.

    With the `facts` of a task, the model gets its head.

    Raises:
      UserError: the mesh asks for experts that the model does not have, no kernel can serve the
        model, or the devices lack the dtype of its matmuls.
    """
    platform = layout.mesh.devices.flat[0].platform
    if layout.mesh.shape["expert"] > 1 and not recipe.model.moe.experts:
        raise UserError("1 for a model without experts", recipe.mesh.expert, "use fsdp, which "
                        "splits the batch and all weights alike", where="config.mesh.expert")
    check_matmul_dtype(recipe.train.matmul_dtype, platform)
    config = recipe.model
    if isinstance(recipe.task, Task) and facts is not None:
        config = dataclasses.replace(config, head=recipe.task.head(config, facts))
    return build_model(config, vocab_size=vocab_size, platform=platform,
                       dtype=recipe.train.dtype(platform), seq_len=recipe.data.seq_len,
                       context=bool(layout.on("seq")),
                       prefix_lm=recipe.data.objective.name == "prefix_lm"
                       ).with_adapters(recipe.adapter)


def make_teacher(recipe: Recipe, layout: Layout, config: ModelConfig) -> Model:
    """Makes the model of a teacher for the devices and the rows of a recipe.

    Raises:
      UserError: no kernel can serve it.
    """
    platform = layout.mesh.devices.flat[0].platform
    return build_model(dataclasses.replace(config, attention="auto"),
                       vocab_size=config.vocab_size, platform=platform,
                       dtype=recipe.train.dtype(platform), seq_len=recipe.data.seq_len,
                       context=bool(layout.on("seq")),
                       prefix_lm=recipe.data.objective.name == "prefix_lm")


def placed(recipe: Recipe,
           quantization: Quantization = NOT_QUANTIZED) -> tuple[Model, Layout]:
    """The recipe's model, and its layout on the devices of this process.

    The weights are split over all devices if they divide, and are whole on each otherwise.

    Args:
      quantization: how they are packed.
    """
    devices = jax.local_devices()
    platform, count = devices[0].platform, len(devices)
    # The run may have used an attention kernel of another platform.
    config = dataclasses.replace(recipe.model, attention="auto")
    model = build_model(
        config, vocab_size=config.vocab_size, platform=platform,
        dtype=recipe.train.dtype(platform), seq_len=recipe.data.seq_len,
        prefix_lm=recipe.data.objective.name == "prefix_lm").with_adapters(recipe.adapter)
    if quantization.weights:
        model = model.with_quantization(quantization)
    split = make_layout(MeshConfig(data=1, fsdp=count, rules={"batch": ()}), devices)
    try:
        split.tree(model.axes, model.shapes)
    except ValueError:  # a dimension does not divide
        return model, make_layout(MeshConfig(data=count, rules={"batch": ()}), devices)
    return model, split


def _losses(recipe: Recipe, model: Model, facts: Facts | None,
            teacher: Model | None) -> tuple[LossFn, LossFn]:
    """What training minimises, and what evaluation computes."""
    train, task = recipe.train, recipe.task
    loss_fn = next_token_loss(model, z_loss=train.z_loss, chunk=train.loss_chunk)
    eval_loss = loss_fn
    if isinstance(task, Task) and facts is not None:
        loss_fn = task.loss(model, facts, z_loss=train.z_loss, chunk=train.loss_chunk)
        eval_loss = task.eval_loss(model, facts)
    if teacher is not None:
        loss_fn = distilled_loss(model, teacher, recipe.distill, z_loss=train.z_loss,
                                 chunk=train.loss_chunk)
    if recipe.quantization.weights:
        rounded = functools.partial(rounded_to, recipe.quantization)
        loss_fn, eval_loss = _within(rounded, loss_fn), _within(rounded, eval_loss)
    low_bits = functools.partial(matmuls_in, train.matmul_dtype)  # of the layers' matmuls
    return _within(low_bits, loss_fn), eval_loss


def _within(context: Callable[[], AbstractContextManager[None]], loss_fn: LossFn) -> LossFn:
    """Returns `loss_fn`, which is traced, forward and backward, within a context."""

    def within(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        with context():
            return loss_fn(params, batch, key)

    return within


def _check_batch(recipe: Recipe, layout: Layout) -> None:
    """Refuses batches that the mesh does not divide."""
    train, evaluation = recipe.train, recipe.eval
    for key, rows in (("train.batch_size / microbatches", train.batch_size // train.microbatches),
                      ("eval.batch_size", evaluation.batch_size or train.batch_size)):
        try:
            layout.spec(("batch", "seq"), (rows, recipe.data.seq_len))
        except UserError as error:
            raise UserError(error.expected, error.got, error.fix,
                            where=f"config.{key}: {error.where}") from None
