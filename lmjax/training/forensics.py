"""What a repeated step shows: the loss and the gradient of each row, and where a NaN came from."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.errors import UserError
from lmjax.models.model import Batch
from lmjax.nn.module import Params
from lmjax.nn.pipeline import split_rows
from lmjax.nn.stack import Unstacked
from lmjax.nn.watched import Seen, first_bad, watched, watching
from lmjax.sharding import Layout, constrain, use_layout
from lmjax.tasks.distillation import Taught
from lmjax.tasks.task import Task
from lmjax.training.replay import Repeated, distance
from lmjax.training.state import TrainState
from lmjax.training.step import LIMITS
from lmjax.tree import named_leaves

# Of the loss of a step: how far the losses of its rows may be from adding up to it.
TOLERANCE = 1e-3


@dataclasses.dataclass
class Row:
    """A row of a step."""

    row: int  # its number in the run
    index: int  # its place in the batch
    tokens: float  # that count in it
    loss: float  # nats per token of its own
    grad_norm: float = math.nan  # of its part of the step's gradient
    has_gradient: bool = False  # whether `grad_norm` was computed
    without: dict[str, float] | None = None  # `Rows.step` without it; None: not computed

    @property
    def is_finite(self) -> bool:
        """Whether nothing that is known of it is infinite or NaN."""
        return math.isfinite(self.loss) and (
            not self.has_gradient or math.isfinite(self.grad_norm))


class Rows(NamedTuple):
    """The rows of a step."""

    rows: list[Row]  # the worst first
    step: dict[str, float]  # of the whole step: loss, grad_norm, update_norm
    note: str  # why there are none; "" if there are


def rows_of(found: Repeated, most: int, also: Sequence[int] = ()) -> Rows:
    """The loss of every row of a step; gradients, and the step without the row, of the worst.

    The model computes a whole batch once per row, so that the row has the noise that it had. In a
    step that is not finite, the other rows are replaced by copies of it.

    Args:
      most: how many are the worst; 0, with no `also`: no row is looked at.
      also: numbers in the run of rows of the step that are treated like the worst ones.

    Raises:
      UserError: the step has no such row.
    """
    step = {**_figures(found.metrics), "update_norm": found.update_norm}
    if unknown := sorted({*also} - {*found.rows.tolist()}):
        raise UserError(f"a row from {found.rows[0]} to {found.rows[-1]}, which the step has",
                        unknown[0], "correct it", where="--without")
    if not (most or also):
        return Rows([], step, "")
    if isinstance(found.run.recipe.task, Task) and found.run.recipe.task.whole_batch:
        return Rows([], step, "The loss compares the rows of a batch: no row has one of its own.")
    found.run.state = None  # `without` holds two more
    healthy = all(map(math.isfinite, (step["loss"], step["grad_norm"])))
    of_row = _of_row(found, alone=not healthy)
    batch = {name: x for name, x in found.batch.items() if name not in LIMITS}
    rows, total = [], 0.0
    for index, row in enumerate(found.rows):
        nats, tokens, _ = map(float, of_row(found.before, batch, index, False))
        rows.append(Row(int(row), index, tokens, nats / tokens if tokens else 0.0))
        total += nats
    whole = step["loss"] * found.metrics["weight"]
    if healthy and abs(total - whole) > TOLERANCE * max(abs(whole), 1.0):
        return Rows([], step, "The losses of single rows do not add up to that of the step.")
    rows.sort(key=lambda row: (math.isfinite(row.loss), -row.loss))
    # A loss may be finite and its gradient not: then each row is looked at.
    hidden = not healthy and all(row.is_finite for row in rows)
    chosen = [row for i, row in enumerate(rows) if i < most or row.row in also]
    for row in rows if hidden else chosen:
        norm = float(of_row(found.before, batch, row.index, True)[2])
        row.grad_norm = norm / found.metrics["weight"] if healthy else norm / max(row.tokens, 1.0)
        row.has_gradient = True
    if hidden:
        rows.sort(key=lambda row: (math.isfinite(row.grad_norm), -row.loss))
        chosen = [row for i, row in enumerate(rows) if i < most or row.row in also]
    for row in chosen:
        row.without = without(found, row.index)
    return Rows(rows, step, "")


def without(found: Repeated, index: int) -> dict[str, float]:
    """The figures of `Rows.step` for the step in which row `index` of the batch does not count."""
    batch = {name: _cleared(x, index) if name.endswith("loss_mask") else x
             for name, x in found.batch.items()}
    after, metrics = found.run.step_of(found.step)(jax.tree.map(jnp.copy, found.before), batch)
    return {**_figures(metrics), "update_norm": float(distance(after.params, found.before.params))}


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(metrics[name]) for name in ("loss", "grad_norm")}


@jax.jit
def _cleared(x: jax.Array, index: int) -> jax.Array:
    return jnp.where(jnp.arange(x.shape[0])[:, None] == index, jnp.zeros((), x.dtype), x)


class _Parts(NamedTuple):
    """How the step cuts its batch: row i is row i // num of part i % num."""

    num: int
    seed: int

    def of(self, batch: Batch, part: Any) -> Batch:
        """The batch of a part."""
        if self.num == 1:
            return batch
        return {name: constrain(split_rows(x, self.num)[part], "batch", "seq")
                for name, x in batch.items()}

    def key(self, step: jax.Array, part: Any) -> jax.Array:
        """The key of the noise of a part."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return key if self.num == 1 else jax.random.fold_in(key, part)


def _of_row(found: Repeated, alone: bool) -> Callable[..., tuple[jax.Array, ...]]:
    """Compiles (state, batch, index, whether with gradient) -> the row's nats, tokens and norm.

    alone: the other rows are replaced by copies of it, else they do not count.
    """
    run, layout = found.run, found.run.layout
    staged = bool(layout.on("layers")) and run.recipe.train.microbatches > 1
    microbatches = run.recipe.train.microbatches
    parts = _Parts(1 if staged else microbatches, run.recipe.train.seed)
    loss_fn = run.program.loss_of(run.model)

    @functools.partial(jax.jit, static_argnums=3, out_shardings=layout.replicated)
    def of_row(state: TrainState, batch: Batch, index: jax.Array,
               with_gradient: bool) -> tuple[jax.Array, ...]:
        part, place = index % parts.num, index // parts.num
        with use_layout(layout, *([microbatches] if staged else [])):
            key = parts.key(state.step, part)
            if staged:
                key = jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(microbatches))
            chosen = {name: _only(x, place, alone, name.endswith("loss_mask"))
                      for name, x in parts.of(batch, part).items()}

            def total(params: Params) -> tuple[jax.Array, Any]:
                loss = loss_fn(state.for_loss(params), chosen, key)
                return loss.total, loss

            if not with_gradient:
                loss, norm = total(state.params)[1], jnp.zeros(())
            else:
                (_, loss), grads = jax.value_and_grad(total, has_aux=True)(state.params)
                norm = optax.tree.norm(grads)
        return loss.nats, loss.weight, norm

    return of_row


def _only(x: jax.Array, place: jax.Array, alone: bool, is_mask: bool) -> jax.Array:
    """The rows of a batch of which only one counts; the others may be copies of it."""
    if alone:
        x = constrain(jnp.broadcast_to(jax.lax.dynamic_slice_in_dim(x, place, 1), x.shape),
                      "batch", "seq")
    here = (jnp.arange(x.shape[0]) == place)[:, None]
    return jnp.where(here, x, jnp.zeros((), x.dtype)) if is_mask else x


@dataclasses.dataclass
class Modules:
    """What the modules of a model gave in a step, forward and backward."""

    forward: str  # the first module whose output is not finite; "": all are
    backward: str  # the first, going backwards, whose output's gradient is not; "": all are
    rows: list[int]  # the numbers in the run of the rows in which `forward` (or `backward`) is not
    loss: float  # of the part of the batch that was looked at
    parameters: list[str]  # those that were not finite before the step
    gradients: list[str]  # the parameters whose gradients are not finite
    outputs: dict[str, float]  # root mean square of each module's output, in order
    output_gradients: dict[str, float]  # the same of their gradients


def modules_of(found: Repeated) -> Modules:
    """Watches every module in a step: in its first part (microbatch) that is not finite, if any."""
    run, layout = found.run, found.run.layout
    microbatches = run.recipe.train.microbatches
    parts = _Parts(microbatches, run.recipe.train.seed)
    size = len(found.rows) // microbatches
    of_part = _of_part(found, parts, size)
    batch = {name: x for name, x in found.batch.items() if name not in LIMITS}
    parameters = bad_leaves(found.before.whole(found.before.params), layout)
    for part in range(microbatches):
        loss, outputs, output_gradients, bad = of_part(found.before, batch, part)
        forward = first_bad(outputs)
        backward = first_bad(output_gradients, backward=True)
        if forward or backward or any(map(np.any, bad.values())) or not np.isfinite(loss):
            break
    seen = outputs.get(forward) if forward else output_gradients.get(backward)
    places = () if seen is None else np.flatnonzero(seen.bad_rows)
    rows = [int(found.rows[place * microbatches + part]) for place in places]
    return Modules(forward, backward, rows, float(loss), parameters,
                   _named_by_layer(bad), *({name: float(seen.rms) for name, seen in them.items()}
                                           for them in (outputs, output_gradients)))


def _of_part(found: Repeated, parts: _Parts, size: int) -> Callable[..., Any]:
    """Compiles (state, batch, part) -> loss, what was seen, and non-finite gradients by name."""
    run, model = found.run, found.run.model
    model = dataclasses.replace(model, functional=watched(model.functional))
    loss_fn = run.program.loss_of(model)
    # Stages have their layers in one computation. Without the layout, the compiler places arrays.
    layout: Layout | None = None if run.layout.on("layers") else run.layout

    def unrolled(given: Any) -> Any:
        if isinstance(given, Taught):
            return given._replace(student=unrolled(given.student))
        return jax.tree.map(lambda p, axes: Unstacked(p) if axes[0] == "layers" else p,
                            model.cast(given), model.axes)

    def total(params: Params, probes: Mapping[str, Seen] | None, state: TrainState, batch: Batch,
              part: jax.Array) -> tuple[jax.Array, Any]:
        with watching(size, probes) as watch:
            loss = loss_fn(unrolled(state.for_loss(params)), parts.of(batch, part),
                           parts.key(state.step, part))
        order[:] = watch.outputs  # JAX sorts the names of a tree
        weight = jnp.where(loss.weight > 0, loss.weight, 1.0)  # a part may count no token
        return loss.total, (loss.nats / weight, watch.outputs)

    def of_part(state: TrainState, batch: Batch, part: jax.Array) -> Any:
        with use_layout(layout):
            shapes = jax.eval_shape(lambda: total(state.params, None, state, batch, part)[1][1])
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
            (grads, seen), (loss, outputs) = gradient(state.params, zeros, state, batch, part)
        return loss, [outputs[name] for name in order], [seen[name] for name in order], _bad(grads)

    order: list[str] = []  # of the computation
    compiled = jax.jit(of_part, out_shardings=run.layout.replicated)

    def named(*args: Any) -> Any:
        loss, outputs, seen, bad = jax.device_get(compiled(*args))
        return (loss, *(dict(zip(order, them, strict=True)) for them in (outputs, seen)), bad)

    return named


def bad_leaves(params: Params, layout: Layout) -> list[str]:
    """The names of the parameters, by layer, that are not finite."""
    return _named_by_layer(jax.device_get(
        jax.jit(_bad, out_shardings=layout.replicated)(params)))


def _bad(params: Params) -> dict[str, jax.Array]:
    """Whether each parameter is not finite, bool []; [layers] for one of all layers."""
    return {name: jnp.any(~jnp.isfinite(x), axis=tuple(range("layers/block/" in name, x.ndim)))
            for name, x in named_leaves(params)}


def _named_by_layer(bad: Mapping[str, Any]) -> list[str]:
    return [name.replace("layers/block/", f"layers[{layer}]/") for name, flags in bad.items()
            for layer in np.flatnonzero(flags)]
