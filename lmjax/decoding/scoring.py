"""What a model says of whole rows: likelihoods and hidden states, one compiled program per length.

The program runs over its rows in passes of a fixed shape and stops after the last row that was
asked for. So a row's result does not depend on the other rows, and rows that nobody asked for cost
nothing. Logits are computed for the scored positions only, some at a time.

Shape suffixes: B rows, T sequence, D embed_dim, V vocab_size, K times C scored positions.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lmjax.decoding.generate import size
from lmjax.decoding.inputs import check_scored
from lmjax.decoding.reading import rows_of
from lmjax.models.model import Batch, Model
from lmjax.nn.module import Params
from lmjax.sharding import current_layout, platform

ROWS = 16  # rows per call, fewer if they are long:
TOKENS = ROWS * 1024  # limit of the tokens per call
LENGTH = 16  # positions of the shortest row that a program is compiled for
# Per doubling of the length, about so many programs are compiled: half the number here. A CPU
# compiles fast and pays for each token of padding.
LENGTHS = {"cpu": 32}
MOST_LENGTHS = 8  # elsewhere
# Tokens per pass, at least one row. A matmul of 64 rows keeps a CPU busy. With 1,024, any chip
# computes for longer than it reads the weights.
PASS_TOKENS = {"cpu": 64}
MOST_TOKENS = 1024  # elsewhere
FEW = 64  # scored tokens of a row, up to which fewer logits are computed at a time
PerToken = tuple[np.ndarray, np.ndarray]  # log-likelihoods and ranks
LOGITS = 1 << 25  # float32 logits that are held at a time (128 MiB), but at least one position's


POOLING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda x_TD: x_TD.mean(0), "first": lambda x_TD: x_TD[0], "last": lambda x_TD: x_TD[-1]}


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """How likely a model finds a token of a text, given those before it."""

    text: str  # what the token adds to the text: "" if it is a part of a character
    log_likelihood: float  # nats
    rank: int  # 1: no other token is likelier


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    log_likelihood: float  # nats, the sum over all tokens
    tokens: int  # of the text
    bytes: int  # of the text, as UTF-8
    of_decoded_text: bool = False  # whether they are those of the decoded text, which differs
    by_token: tuple[TokenScore, ...] = ()  # of each token, if asked for

    @property
    def bits_per_byte(self) -> float:
        """-log2 of the likelihood, per byte of text."""
        return -self.log_likelihood / math.log(2) / max(self.bytes, 1)

    @property
    def perplexity(self) -> float:
        """exp of the mean -log likelihood per token."""
        return math.exp(-self.log_likelihood / max(self.tokens, 1))


def total(log_p: np.ndarray) -> float:
    """The sum of log-likelihoods, in float64."""
    return float(log_p.sum(dtype=np.float64))


def draw_surprise(tokens: Sequence[str], scores: Sequence[TokenScore],
                  out: str | os.PathLike) -> None:
    """Draws the labels of a text's tokens by -log2 of their likelihoods; `out`: .png or .svg."""
    from lmjax.reporting.token_pictures import draw_tokens  # matplotlib takes half a second

    bits = [-score.log_likelihood / math.log(2) for score in scores]
    mean = sum(bits) / max(len(bits), 1)
    draw_tokens(tokens, bits, out, legend=("expected", "bits: surprising"),
                title=f"surprise of each token: {mean:.2f} bits on average")


def states(model: Model, params: Params, batch: Batch, count: jax.Array) -> jax.Array:
    """The last hidden states [B, T, D] (see `Model.encode`) of the first `count` rows."""
    found: jax.Array = in_passes(lambda part: model.encode(params, part)[0], batch, count)
    return found


def likelihoods(model: Model, params: Params, batch: Batch, count: jax.Array, at_KC: jax.Array,
                targets_KC: jax.Array, scored: jax.Array, *,
                ranks: bool = False) -> tuple[jax.Array, jax.Array]:
    """Scores tokens after positions of the first `count` rows, C at a time.

    Args:
      at_KC: positions in the rows laid end to end.
      targets_KC: the token after each.
      scored: how many of them count; the others are padding.
      ranks: whether ranks beyond the first are told apart.

    Returns:
      The targets' log-likelihoods, float32 [K, C], and their ranks, int32 [K, C]; 1: the likeliest.
    """
    x_BTD = in_passes(lambda part: model.hidden(params, part).x_BTD, batch, count)
    x_ND, C = x_BTD.reshape(-1, x_BTD.shape[-1]), at_KC.shape[1]
    layout = current_layout()

    def chunk(i: jax.Array, out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        target_C1 = targets_KC[i][:, None]
        logits_CV = model.unembed(params, x_ND[at_KC[i]][None])[0]
        if layout is None or layout.mesh.size == 1:
            target_C = jnp.take_along_axis(logits_CV, target_C1, axis=1)[:, 0]
        else:  # a gather from a sharded vocabulary would collect all logits first
            hit_CV = lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == target_C1
            target_C = jnp.sum(jnp.where(hit_CV, logits_CV, 0.0), axis=1)
        top_C1 = jnp.max(logits_CV, axis=1, keepdims=True)
        log_z = top_C1[:, 0] + jnp.log(jnp.sum(jnp.exp(logits_CV - top_C1), axis=1))
        if ranks:
            rank_C = 1 + jnp.sum(logits_CV > target_C[:, None], axis=1, dtype=jnp.int32)
        else:  # without another pass over the logits
            rank_C = jnp.where(target_C >= top_C1[:, 0], 1, 2)
        log_p_KC, rank_KC = (x.at[i].set(part) for x, part in
                             zip(out, (target_C - log_z, rank_C), strict=True))
        return log_p_KC, rank_KC

    empty = jnp.zeros(at_KC.shape, jnp.float32), jnp.zeros(at_KC.shape, jnp.int32)
    return lax.fori_loop(0, (scored + C - 1) // C, chunk, empty)


def _at_once(model: Model, many: bool) -> int:
    """How many logits are computed at a time. It depends on a row alone, like all of its shapes."""
    fitting = max(LOGITS // model.config.vocab_size, 1)
    return min(_pass_tokens() * (1 + many), 1 << fitting.bit_length() - 1)


def _pass_tokens() -> int:
    return PASS_TOKENS.get(platform(), MOST_TOKENS)


def batches(model: Model, pieces: Sequence[Sequence[int]],
            given: Sequence[int]) -> Iterator[tuple[list[int], Any]]:
    """Puts pieces of like length together, of which few or many tokens are not given.

    Args:
      model, pieces, given: as in `rows_of`.

    Yields:
      (indices of pieces, the batch whose first rows they are).
    """
    by_size: dict[tuple[int, bool], list[int]] = {}
    for i, ids in enumerate(pieces):
        length = size(len(ids) - 1, LENGTH, LENGTHS.get(platform(), MOST_LENGTHS))
        by_size.setdefault((length, len(ids) - given[i] > FEW), []).append(i)
    for (length, _), members in sorted(by_size.items()):
        count = max(1, min(ROWS, TOKENS // length))
        for at in range(0, len(members), count):
            part = members[at : at + count]
            yield part, rows_of(model, [pieces[i] for i in part], count, length,
                                [given[i] for i in part])


def token_likelihoods(model: Model, run: Callable[..., tuple[jax.Array, jax.Array]],
                      params: Params, rows: Sequence[tuple[Sequence[int], int]]) -> list[PerToken]:
    """Scores the last ids of each row, given the ids before them.

    Args:
      model: the decoder.
      run: `likelihoods` of it, compiled.
      params: its parameters.
      rows: (token ids, how many of the last ones to score).

    Returns:
      Per row, the log-likelihoods of the scored ids, float32 [n], and their ranks, int32 [n].

    Raises:
      UserError: an error of `check_scored`.
    """
    rows = check_scored(rows, model.config)
    out = [(np.zeros(0, np.float32), np.zeros(0, np.int32))] * len(rows)
    asked = [i for i, (_, n) in enumerate(rows) if n]
    pieces = [rows[i][0] for i in asked]
    for part, batch in batches(model, pieces, [len(rows[i][0]) - rows[i][1] for i in asked]):
        length = batch["tokens"].shape[1]
        ends = [(row * length + len(pieces[i]) - 1, rows[asked[i]][1])
                for row, i in enumerate(part)]
        wanted = np.concatenate([np.arange(end - n, end) for end, n in ends])
        C = _at_once(model, ends[0][1] > FEW)
        at_KC = np.zeros((-(-batch["tokens"].size // C), C), np.int32)
        at_KC.reshape(-1)[: len(wanted)] = wanted
        found = run(params, batch, np.int32(len(part)), at_KC,
                    batch["targets"].reshape(-1)[at_KC], np.int32(len(wanted)))
        nats, rank = (np.asarray(x).reshape(-1) for x in found)
        begin = 0
        for i, (_, n) in zip(part, ends, strict=True):
            span = slice(begin, begin := begin + n)
            out[asked[i]] = nats[span], rank[span]
    return out


def embeddings(model: Model, run: Callable[..., jax.Array], params: Params,
               rows: Sequence[Sequence[int]], pooling: str, normalize: bool) -> np.ndarray:
    """One vector per row of ids, float32 [rows, D]: see `LM.embed`; `run` is `states`, compiled."""
    out = np.zeros((len(rows), model.config.embed_dim), np.float32)
    pieces = [[*row, 0] for row in rows]
    for part, batch in batches(model, pieces, [len(row) for row in rows]):
        x_BTD = np.asarray(run(params, batch, np.int32(len(part))), np.float32)
        for x_TD, i in zip(x_BTD, part, strict=False):
            out[i] = POOLING[pooling](x_TD[: len(rows[i])])
    if not normalize:
        return out
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


def in_passes(run: Callable[[Batch], Any], batch: Batch, count: jax.Array) -> Any:
    """Runs the first `count` rows of a batch, always as many at once.

    Args:
      run: from rows to an array, or a tree of arrays, with a first dimension of rows.
      batch: arrays of rows.
      count: how many rows matter.

    Returns:
      What `run` gives for all rows; zeros after those that matter.
    """
    B, T = batch["tokens"].shape
    G = min(B, max(_pass_tokens() // T, 1))

    def part(i: jax.Array | int) -> Batch:
        return {name: lax.dynamic_slice_in_dim(x, i * G, G) for name, x in batch.items()}

    def one(i: jax.Array, out: Any) -> Any:
        return jax.tree.map(lambda whole, rows: lax.dynamic_update_slice_in_dim(
            whole, rows, i * G, 0), out, run(part(i)))

    shapes = jax.eval_shape(lambda: run(part(0)))
    zeros = jax.tree.map(lambda x: jnp.zeros((B, *x.shape[1:]), x.dtype), shapes)
    return lax.fori_loop(0, (count + G - 1) // G, one, zeros)
