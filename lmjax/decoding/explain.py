"""How much each token that a model reads adds to a log-likelihood, from gradients by embeddings.

| method | value of a token with the embedding x, where f is the log-likelihood |
| --- | --- |
| gradient_x_input | f'(x) . x |
| integrated_gradients | (x - m) . the mean of f' on the straight path from m to x |

The values of integrated gradients (arXiv:1703.01365) add up to f(x) - f(m): the axiom of
completeness. The baseline m of every token is the mean of all embeddings. At 0, the paper's choice
for text, a model that begins with a norm has no derivative. Only the path tells how many points the
mean needs, so they are doubled until the axiom holds and the values stay the same.

Shape suffixes: B rows (always 1), T sequence, I tokens that are read (by an encoder-decoder: first
the encoder's), N points, D embed_dim, V vocab_size.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lmjax.data.reading import Reader
from lmjax.data.rows import ENCODER
from lmjax.data.tokenizers.base import MASKS
from lmjax.decoding.generate import jit_on, size
from lmjax.decoding.inputs import check_positions
from lmjax.decoding.reading import rows_of
from lmjax.decoding.scoring import LENGTH
from lmjax.decoding.token_texts import labels
from lmjax.errors import UserError
from lmjax.models.model import Batch, Model, build_model
from lmjax.nn.losses import cross_entropy
from lmjax.nn.module import Params
from lmjax.sharding import Layout

METHODS = ("integrated_gradients", "gradient_x_input")
POINTS = 16  # of the path per call
MOST_POINTS = 256
TOLERANCE = 0.01  # of max(|f(x) - f(m)|, 1 nat): how far the values' sum may be from it


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How much each token that a model reads adds to the log-likelihood of a target."""

    tokens: tuple[str, ...]  # a label for each token that is read
    values: np.ndarray  # float32 [tokens], nats
    target: tuple[str, ...]  # labels of the tokens whose likelihood it is
    # Where each of the target stands among the tokens; an answer's last token is not read and
    # stands after them. A class stands nowhere.
    places: tuple[int, ...]
    log_likelihood: float  # of the target, nats
    # Its log-likelihood where every token has the mean embedding; nan for gradient_x_input.
    baseline: float
    method: str

    @property
    def gap(self) -> float:
        """By how many nats the sum of the values misses completeness; nan without a baseline."""
        return float(self.values.sum(dtype=np.float64)) - (self.log_likelihood - self.baseline)

    def draw(self, out: str | os.PathLike) -> None:
        """Draws the tokens by their values; `out` is a file (.png, .svg)."""
        from lmjax.reporting.token_pictures import draw_tokens  # matplotlib takes half a second

        names, values = [*self.tokens, ""], [*self.values, math.nan]
        for place, label in zip(self.places, self.target, strict=True):
            names[place] = label
        count = max([len(self.tokens), *(place + 1 for place in self.places)])
        whole = len(self.places) == len(self.tokens)  # the text itself is explained
        what = "the text" if whole else f"\u201c{''.join(self.target).strip()}\u201d"
        draw_tokens(
            names[:count], values[:count], out,
            legend=("no effect" if self.values.min() >= 0 else "less likely", "more likely"),
            title=f"{self.method.replace('_', ' ')}: what makes {what:.50} likely "
                  f"(log-likelihood {self.log_likelihood:.2f} nats)",
            marked=() if whole else self.places)


@dataclasses.dataclass(frozen=True)
class Question:
    """What is explained: a row that the model reads, and the targets in it."""

    ids: list[int]  # that are read, without padding
    at: list[int]  # where each of them lies among the I places of `inputs`
    inputs: np.ndarray  # int32 [I]: the ids at all places, padding included
    batch: Batch  # [1, T]; `loss_mask` is 1 on the targets
    target: list[int]
    places: list[int]  # as in `Explanation`
    names: tuple[str, ...] = ()  # of the target, where it is a class and no token


def explain(model: Model, params: Params, layout: Layout, reader: Reader, question: Question,
            method: str) -> Explanation:
    """Explains the likelihood of a question's target; `method` is one of METHODS."""
    model, params = model.dense(params)  # gradients are those of places in the float table
    run = _compiled(model, layout)

    def at_points(alphas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """f [N], f' . (x - m) and f' . x [N, I], at the points m + alpha (x - m)."""
        found = []
        for first in range(0, len(alphas), POINTS):
            part = alphas[first : first + POINTS].astype(np.float32)
            padded = np.pad(part, (0, POINTS - len(part)))
            arrays = run(params, question.inputs, question.batch, padded, np.int32(len(part)))
            found.append([np.asarray(x)[: len(part)] for x in arrays])
        f_N, moved_NI, whole_NI = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return f_N, moved_NI, whole_NI

    (baseline, value), _, (_, values_I) = at_points(np.array([0.0, 1.0]))
    if method == "integrated_gradients":
        values_I = _integrated(at_points, float(value - baseline))
    else:
        baseline = math.nan
    return Explanation(
        tuple(labels(reader.names, question.ids)), values_I[question.at].astype(np.float32),
        question.names or tuple(labels(reader.names, question.target)), tuple(question.places),
        float(value), float(baseline), method)


def _integrated(at_points: Callable[[np.ndarray], tuple[np.ndarray, ...]],
                difference: float) -> np.ndarray:
    """The mean of f' . (x - m) over the path, [I], by Gauss and Legendre's rule."""
    count, before_I, bound = POINTS, None, TOLERANCE * max(abs(difference), 1.0)
    while True:
        at_N, weight_N = np.polynomial.legendre.leggauss(count)  # from -1 to 1
        values_I = weight_N / 2 @ at_points((at_N + 1) / 2)[1].astype(np.float64)
        # The sum alone may be right by chance: each value has to stay as it was, too.
        near = (before_I is not None and abs(values_I.sum() - difference) <= bound
                and np.abs(values_I - before_I).max() <= bound)
        if near or count == MOST_POINTS:
            return values_I
        count, before_I = 2 * count, values_I


@functools.lru_cache(maxsize=4)
def _compiled(model: Model, layout: Layout) -> Callable[..., tuple[jax.Array, ...]]:
    """Compiles (params, inputs [I], batch, alphas [N], count) -> what `at_points` returns.

    The rows of the embedding table become the embeddings of single places, so that their gradients
    are those of the places. A tied unembedding keeps the table as it is.
    """
    place = layout.mesh.devices.flat[0].platform
    apart = build_model(dataclasses.replace(model.config, tie_embeddings=False), vocab_size=0,
                        platform=place, dtype=jnp.float32, prefix_lm=model.prefix_lm)

    def log_likelihood(x_ID: jax.Array, params: Params, batch: Batch) -> jax.Array:
        hidden = apart.hidden({**params, "embedding": {"table": x_ID}}, batch)
        return -cross_entropy(hidden.x_BTD, hidden.table_VD, batch["targets"], batch["loss_mask"],
                              bias_V=hidden.bias_V, softcap=apart.config.output_softcap).total

    def run(params: Params, inputs_I: jax.Array, batch: Batch, alphas_N: jax.Array,
            count: jax.Array) -> tuple[jax.Array, ...]:
        if not model.config.head.outputs:  # a task's head has a table of its own
            params = {"head": params["embedding"], **params}
        table_VD = params["embedding"]["table"]
        x_ID, mean_1D = table_VD[inputs_I], jnp.mean(table_VD, axis=0, keepdims=True)
        moved_ID = x_ID - mean_1D

        def one(n: jax.Array, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            point_ID = mean_1D + alphas_N[n] * moved_ID
            f, slope_ID = jax.value_and_grad(log_likelihood)(point_ID, params, batch)
            found = f, jnp.sum(slope_ID * moved_ID, axis=1), jnp.sum(slope_ID * x_ID, axis=1)
            return tuple(x.at[n].set(part) for x, part in zip(out, found, strict=True))

        of_all = jnp.zeros((POINTS, len(inputs_I)))
        return lax.fori_loop(0, count, one, (jnp.zeros(POINTS), of_all, of_all))

    return jit_on(layout, run, out_shardings=layout.replicated)


def question_of(model: Model, reader: Reader, text: str, answer: str,
                logits: Callable[[Batch], jax.Array], classes: Sequence[str] = ()) -> Question:
    """What a model of each family is asked about a text.

    Args:
      text: what it reads. In an encoder's text, masks stand for tokens.
      answer: the target. A decoder's "" is the text itself, an encoder's the likeliest tokens in
        place of the masks. Of a classifier it is a class, by name or number; "": the likeliest.
      logits: of a batch, [B, T, V].
      classes: the names of a classifier's classes, in order.

    Raises:
      UserError: there is no target, a mask is missing, or a row is longer than learned positions.
    """
    if model.config.head.outputs:
        names = tuple(classes) or tuple(f"class {i}" for i in range(model.config.head.outputs))
        return _classified(model, reader, text, answer, logits, names)
    if model.config.family == "encoder":
        return _masked(model, reader, text, answer, logits)
    ask = _answered if model.config.family == "encdec" else _continued
    return ask(model, reader, text, answer)


def _continued(model: Model, reader: Reader, text: str, answer: str) -> Question:
    before, ids = (reader.ids(t, end=False) for t in (text, text + answer))
    same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b),
                min(len(before), len(ids)))
    given = max(same, 1) if answer else 1
    if given >= len(ids):
        raise UserError("a text of at least two tokens, or an answer", f"{len(ids)} token(s)",
                        "write more", "answer" if answer else "text")
    check_positions(model.config, len(ids) - 1, "text")
    batch = _row(model, ids, given)
    return _question(batch, ids[:-1], ids[given:], range(given, len(ids)))


def _answered(model: Model, reader: Reader, text: str, answer: str) -> Question:
    source, target = reader.ids(text), reader.names.encode(answer)
    if not target:
        raise UserError("an answer, whose likelihood is explained", "none",
                        "pass one, such as lm.generate([text], temperature=0)[0]", "answer")
    check_positions(model.config, max(len(source), len(target)), "text")
    batch = _row(model, [reader.start_id, *target], 1)
    batch |= {name: x for name, x in _row(model, [*source, 0], 1).items() if name in ENCODER}
    ids = [*source, reader.start_id, *target[:-1]]
    return _question(batch, ids, target, range(len(source) + 1, len(ids) + 1))


def _masked(model: Model, reader: Reader, text: str, answer: str,
            logits: Callable[[Batch], jax.Array]) -> Question:
    name, mask_id = mask_of(reader)
    ids, target = reader.ids(text), reader.names.encode(answer)
    at = [i for i, token in enumerate(ids) if token == mask_id]
    if not at:
        raise UserError(f"a text with {name}, whose token is explained", "none",
                        f"write {name} in place of a word", "text")
    check_positions(model.config, len(ids), "text")
    batch = _row(model, [*ids, 0], len(ids))
    if not target:
        logits_TV = np.asarray(logits(batch))[0, at, : reader.names.vocab_size]
        target = np.argmax(logits_TV, axis=1).tolist()
    if len(target) != len(at):
        raise UserError(f"{len(at)} token(s), as many as masks",
                        f"{len(target)}: {' | '.join(labels(reader.names, target))}",
                        f"write {len(target)} times {name}, or another answer", "answer")
    batch["loss_mask"][:] = 0.0
    batch["loss_mask"][0, at] = 1.0
    batch["targets"][0, at] = target
    return _question(batch, ids, target, at)


def _classified(model: Model, reader: Reader, text: str, answer: str,
                logits: Callable[[Batch], jax.Array], names: Sequence[str]) -> Question:
    ids = reader.ids(text)
    check_positions(model.config, len(ids), "text")
    at = len(ids) - 1 if model.config.family == "decoder" else 0  # as in training
    batch = _row(model, [*ids, 0], len(ids))
    if answer in names:
        chosen = names.index(answer)
    elif answer:
        chosen = int(answer) if answer.isdecimal() else len(names)
    else:
        chosen = int(np.argmax(np.asarray(logits(batch))[0, at]))
    if chosen >= len(names):
        raise UserError(f"one of the classes {', '.join(names)[:200]}, or its number, 0 to "
                        f"{len(names) - 1}", repr(answer), "write one, or leave it out for the "
                        "likeliest", "answer")
    batch["loss_mask"][:], batch["targets"][0, at] = 0.0, chosen
    batch["loss_mask"][0, at] = 1.0
    return dataclasses.replace(_question(batch, ids, [chosen], ()), names=(names[chosen],))


def mask_of(reader: Reader) -> tuple[str, int]:
    """The name and the id of the token that stands for a hidden one.

    Raises:
      UserError: the model knows none.
    """
    names, tokenizer = reader.names, reader.names.tokenizer
    name = next((name for name in MASKS if name in names.ids), tokenizer.mask_name)
    found = None if name is None else names.ids.get(name, tokenizer.id_of(name))
    if name is None or found is None:
        raise UserError("a model with a token for hidden ones, such as [MASK]", "none",
                        "use a model that was trained with masks", "text")
    return name, found


def _row(model: Model, ids: Sequence[int], given: int) -> dict[str, Any]:
    """A batch of one row; its loss mask counts the ids after the first `given` ones."""
    batch = rows_of(model, [ids], 1, size(len(ids) - 1, LENGTH), [given])
    batch["loss_mask"] *= batch["positions"] >= given - 1
    return batch


def _question(batch: dict[str, Any], ids: list[int], target: list[int],
              places: Sequence[int]) -> Question:
    """Numbers the places of the row: each place's token is the row of the table that it has."""
    fields = ("encoder_tokens", "tokens") if "encoder_tokens" in batch else ("tokens",)
    inputs, at = np.zeros(0, np.int32), list[int]()
    for name in fields:
        tokens = batch[name][0]
        here = int((batch[name.replace("tokens", "segment_ids")][0] > 0).sum())
        at += range(len(inputs), len(inputs) + here)
        batch[name] = np.arange(len(inputs), len(inputs) + len(tokens), dtype=np.int32)[None]
        inputs = np.concatenate([inputs, tokens])
    assert inputs[at].tolist() == ids
    return Question(ids, at, inputs, batch, target, list(places))
