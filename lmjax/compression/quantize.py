"""A model with its weights packed as small integers.

    lm = lmjax.load("runs/quickstart")
    small = quantize(lm, Quantization("int4", group=128), texts=texts)
    small.save("runs/quickstart-int4")
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.compression.gptq import rounded
from lmjax.decoding.inputs import check_texts
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.model import Model
from lmjax.models.packing import as_dict, as_matrix, matrices, pack_params
from lmjax.nn.layers import Dense
from lmjax.nn.module import Params, functional
from lmjax.nn.packed import Quantization
from lmjax.nn.recorded import recording

LEAST_TOKENS = 1024  # of the texts that inputs are seen in
ROWS = 8  # per pass


def quantize(lm: LM, quantization: Quantization, *, texts: Sequence[str] = (),
             log: Callable[[str], None] = print) -> LM:
    """Packs a model's weights.

    Args:
      lm: a model with float32 weights, without adapters.
      quantization: the format of the integers.
      texts: what the model reads. With texts, GPTQ rounds the matrices of layers so that their
        outputs on them change least; without, each weight goes to the nearest integer. The tables
        of tokens and the matrices of experts are always rounded to the nearest.
      log: prints a line for the user.

    Raises:
      UserError: the weights are packed already, the model has adapters, it is asked for no format,
        or the texts have too few tokens.
    """
    model = lm.model
    if not quantization.weights:
        raise UserError("a format of weights", "none", "choose int8 or int4", "quantize")
    if model.quantization.weights:
        raise UserError("a model with float32 weights", model.quantization.weights,
                        "quantise the model that it was made from", where=lm.source)
    packed = model.with_quantization(quantization)
    shardings = lm.layout.tree(packed.axes, packed.shapes)
    pack_all = jax.jit(lambda params: pack_params(model.functional, params, quantization),
                       out_shardings=shardings)
    params = pack_all(lm.params)
    if texts:
        grams = _grams(lm, texts, log)
        for path, gram in grams.items():
            _replace(params, path, _by_gptq(lm.params, path, model, gram, quantization))
        log(f"{len(grams)} kinds of matrices rounded by GPTQ")
        params = jax.device_put(params, shardings)
    about = lm.about | {"quantization": dataclasses.asdict(quantization)}
    return LM(packed, params, lm.layout, lm.tokenizer, lm.recipe, about, lm.source)


def _grams(lm: LM, texts: Sequence[str], log: Callable[[str], None]) -> dict[str, jax.Array]:
    """By path of a dense kernel: the sums of x x^T over its inputs, [layers, I, I] or [I, I]."""
    rows = _rows(lm, check_texts(texts, "texts"))
    model, names = _recorder(lm.model)

    @jax.jit
    def run(params: Params, tokens: jax.Array, total: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None],
                                     tokens.shape)
        batch = {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones_like(tokens)}
        with recording(*names) as stacks:
            model.hidden(params, batch)
        found = {name: gram for stack in stacks for name, gram in stack.items()}
        return found if total is None else jax.tree.map(jnp.add, total, found)

    total = None
    for at in range(0, len(rows), ROWS):
        total = run(lm.params, jnp.asarray(rows[at : at + ROWS]), total)
    log(f"inputs of {len(names)} kinds of matrices seen in {rows.size:,} tokens")
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
    length = min(length, len(every))
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


def _by_gptq(params: Params, path: str, model: Model, gram: jax.Array,
             quantization: Quantization) -> dict[str, jax.Array]:
    how = matrices(model.functional)[path]
    whole = as_matrix(_at(params, path), how)  # [*lead, *out, I]
    grams = gram if how.lead else gram[None]
    layers = whole if how.lead else whole[None]
    made = []
    for w, one in zip(layers, grams, strict=True):
        packed = rounded(w.reshape(-1, w.shape[-1]), one, quantization.weights,
                         quantization.group)
        made.append(as_dict(packed))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *made)
    lead = whole.shape[:-1]
    return {name: x.reshape(*lead, x.shape[-1]) for name, x in stacked.items()}


def _at(params: Params, path: str) -> Any:
    for key in path.split("/"):
        params = params[key]
    return params


def _replace(params: Params, path: str, node: dict[str, jax.Array]) -> None:
    *above, last = path.split("/")
    _at(params, "/".join(above))[last] = node
