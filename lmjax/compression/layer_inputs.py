"""What the layers of a model read and change, over texts.

Shape suffixes: B batch, T sequence, D embed_dim, L layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.decoding.inputs import check_texts
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.model import Model
from lmjax.models.packing import matrices
from lmjax.nn.layers import Dense
from lmjax.nn.module import Params, functional
from lmjax.nn.recorded import Recorded, recording

LEAST_TOKENS = 1024  # of the texts
LONGEST = 2048  # tokens of a row: an imported model may take rows that no memory holds
ROWS = 8  # per pass


def grams(lm: LM, texts: Sequence[str], log: Callable[[str], None]) -> dict[str, jax.Array]:
    """By path of a dense kernel: the sums of x x^T over its inputs, [L, I, I] or [I, I].

    Raises:
      UserError: the texts have too few tokens, or the model is an encoder-decoder.
    """
    rows = _rows(lm, check_texts(texts, "texts"))
    model, names = _recorder(lm.model)
    total = _sums(lm, model, rows, names, lambda found: found)
    log(f"inputs of {len(names)} kinds of matrices seen in {rows.size:,} tokens")
    return total


def influences(lm: LM, texts: Sequence[str]) -> np.ndarray:
    """How much each layer turns the residual stream: 1 - cosine of what enters and leaves it.

    It is the mean over all tokens, as in Men et al. 2024, arXiv:2403.03853.

    Returns:
      float32 [L].

    Raises:
      UserError: as `grams`.
    """
    rows = _rows(lm, check_texts(texts, "texts"))

    def cosines(found: Recorded) -> Recorded:
        a, b = (found[name].astype(jnp.float32) for name in ("entry", "state"))
        lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        return {"cosine": jnp.sum(jnp.sum(a * b, axis=-1) / jnp.maximum(lengths, 1e-30), (1, 2))}

    total = _sums(lm, lm.model, rows, ["entry", "state"], cosines)
    return np.asarray(1 - total["cosine"] / rows.size)


def _sums(lm: LM, model: Model, rows: np.ndarray, names: Sequence[str],
          reduce: Callable[[Recorded], Recorded]) -> Recorded:
    """Sums `reduce(what the layers record under these names)` over all rows."""
    @jax.jit
    def run(params: Params, tokens: jax.Array, total: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None],
                                     tokens.shape)
        batch = {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones_like(tokens)}
        with recording(*names) as stacks:
            model.hidden(params, batch)
        found = reduce({name: x for stack in stacks for name, x in stack.items()})
        return found if total is None else jax.tree.map(jnp.add, total, found)

    total = None
    for at in range(0, len(rows), ROWS):
        total = run(lm.params, jnp.asarray(rows[at : at + ROWS]), total)
    assert total is not None
    return dict(total)


def _rows(lm: LM, texts: Sequence[str]) -> np.ndarray:
    """The texts' tokens, one after another, in rows of the length of training: int32 [B, T]."""
    tokenizer, length = lm.need_tokenizer(), lm.recipe.data.seq_len
    if lm.model.config.family == "encdec":
        raise UserError("a decoder or an encoder", "an encoder-decoder", "leave the texts out",
                        where="texts")
    ids = [np.asarray([tokenizer.bos_id, *x]) for x in tokenizer.encode_batch(texts)]
    every = np.concatenate(ids).astype(np.int32)
    if len(every) < LEAST_TOKENS:
        raise UserError(f"texts of {LEAST_TOKENS:,} tokens or more", f"{len(every):,}",
                        "pass more text, like what the model reads", where="texts")
    length = min(length, LONGEST, len(every))
    count = len(every) // length
    count -= count % ROWS if count > ROWS else 0  # one shape to compile
    return every[: count * length].reshape(count, length)


def _recorder(model: Model) -> tuple[Model, list[str]]:
    """The model, whose dense layers record x^T x under the paths of their kernels."""
    names: list[str] = []
    known = matrices(model.functional)

    def build(rngs: nnx.Rngs) -> nnx.Module:
        module = model.functional.build(rngs)
        names.clear()
        for parts, node in nnx.iter_modules(module):
            path = "/".join(map(str, parts)) + "/kernel"
            if isinstance(node, Dense) and path in known:
                node.recorded_as = path
                names.append(path)
        return module

    made = dataclasses.replace(model, functional=functional(build))
    return made, names
