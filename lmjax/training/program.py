"""From a recipe and devices to the program that trains it: what `lmjax train` runs and `lmjax plan` compiles."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

from lmjax.data.packing import dtype_of
from lmjax.models.model import Batch, Model, build_model
from lmjax.nn.module import Params
from lmjax.nn.quantized import check_matmul_dtype, matmuls_in
from lmjax.sharding import Layout, make_layout
from lmjax.training.losses import Loss
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.optim.table import make_optimizer
from lmjax.training.recipe import Recipe
from lmjax.training.state import StateSpec, state_spec
from lmjax.training.step import LossFn, make_eval_step, make_train_step, next_token_loss


class Program(NamedTuple):
    """The pure part of a run: no data, no files, not one array.

    traced: the train step for the devices of its mesh, which need not be there; `.lower().compile()` compiles it.
    batch: name -> `ShapeDtypeStruct` [B, T] of a training batch, with its sharding.
    """

    layout: Layout
    model: Model
    spec: StateSpec
    traced: jax.stages.Traced
    eval_fn: Callable[[Params, Batch], Loss]
    batch: dict[str, jax.ShapeDtypeStruct]


def make_program(recipe: Recipe, devices: Sequence[jax.Device], *, vocab_size: int,
                 fields: Mapping[str, int]) -> Program:
    """The program of `recipe` over `devices` for data of `vocab_size` tokens.

    devices: real ones, or those of a topology that is only described (`jax.experimental.topologies`). fields: the
    length of a row of each array of a batch, as of the objective.

    Raises:
      ValueError: the mesh does not fit the devices, the model, its activations or the batch, or no kernel can serve
        the model.
    """
    layout = make_layout(recipe.mesh, devices)
    model = make_model(recipe, layout, vocab_size=vocab_size)
    schedule = make_schedule(recipe.optimizer, recipe.train.steps)
    tx = make_optimizer(recipe.optimizer, recipe.train.steps, model.axes)
    spec = state_spec(model, tx, layout, ema=recipe.optimizer.ema_decay > 0)
    _check_batch(recipe, layout)
    loss_fn = next_token_loss(model, z_loss=recipe.train.z_loss, chunk=recipe.train.loss_chunk)
    step_fn = make_train_step(_in(recipe.train.matmul_dtype, loss_fn), spec, layout, schedule, seed=recipe.train.seed,
                              microbatches=recipe.train.microbatches, ema_decay=recipe.optimizer.ema_decay)
    rows, sharding = recipe.train.batch_size, layout.sharding(("batch", "seq"))
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype_of(name), sharding=sharding)
             for name, length in fields.items()}
    return Program(layout, model, spec, step_fn.trace(spec.shapes, batch),
                   make_eval_step(loss_fn, layout, recipe.train.microbatches), batch)


def make_model(recipe: Recipe, layout: Layout, *, vocab_size: int) -> Model:
    """The model of `recipe` on the devices of `layout`, for data of `vocab_size` tokens.

    Raises:
      ValueError: no kernel can serve the model, or its matmuls or the mesh ask for what it or the devices have not.
    """
    platform = layout.mesh.devices.flat[0].platform
    if layout.mesh.shape["expert"] > 1 and not recipe.model.moe.experts:
        raise ValueError(f"config.mesh.expert: expected 1 for a model without experts, got {recipe.mesh.expert}; use "
                         "fsdp, which splits the batch and all weights alike")
    check_matmul_dtype(recipe.train.matmul_dtype, platform)
    return build_model(recipe.model, vocab_size=vocab_size, platform=platform, dtype=recipe.train.dtype(platform),
                       seq_len=recipe.data.seq_len, context=bool(layout.on("seq")),
                       prefix_lm=recipe.data.objective.name == "prefix_lm")


def _in(matmul_dtype: str, loss_fn: LossFn) -> LossFn:
    """`loss_fn` with its layers' matmuls, and those of its gradient, in `matmul_dtype`."""

    def quantised(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        with matmuls_in(matmul_dtype):
            return loss_fn(params, batch, key)

    return quantised


def _check_batch(recipe: Recipe, layout: Layout) -> None:
    rows = recipe.train.batch_size // recipe.train.microbatches
    for name, size in (("train.batch_size / microbatches", rows),
                       ("eval.batch_size", recipe.eval.batch_size or recipe.train.batch_size)):
        try:
            layout.spec(("batch", "seq"), (size, recipe.data.seq_len))
        except ValueError as error:
            raise ValueError(f"config.{name}: {error}") from None
