"""The sizes of an engine: what a user may set, checked against the models."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from lmjax.config import at_least, choice
from lmjax.data.reading import check_told
from lmjax.decoding.generate import Generator, TokenIds
from lmjax.decoding.inputs import check_numbers, check_positions
from lmjax.decoding.reading import generator_of
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.model import Model
from lmjax.nn.kv_cache import KV_CACHES
from lmjax.runtime.devices import device_memory
from lmjax.serving.programs import Programs, Shapes, compiled, empty
from lmjax.serving.requests import Request
from lmjax.sharding import Layout

DEFAULT_LENGTH = 2048  # tokens of a prompt and its answer, where the model could take more
# The end of a prompt is read in a smaller chunk, whose size is a multiple of chunk / TAILS and of
# LEAST tokens: fewer take no less time.
TAILS, LEAST = 4, 16


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of an engine. They decide its memory, which does not grow."""

    slots: int = 16  # requests that are answered at the same time
    # Tokens that a prompt and its answer may have together. 0: as many as a row of training, but at
    # most `DEFAULT_LENGTH`.
    max_length: int = 0
    chunk: int = 64  # tokens of a prompt that are read between two steps
    # Tokens of prompts that are kept for other requests that begin with them. -1: a quarter of the
    # slots' tokens.
    prefix_tokens: int = -1
    kv_cache: str = "float"  # how keys and values are kept: a row of `nn.kv_cache.KV_CACHES`
    propose: int = 4  # tokens that the draft proposes per step, if there is a draft

    def __post_init__(self) -> None:
        check_numbers(self)
        at_least(1, slots=self.slots, chunk=self.chunk, propose=self.propose)
        at_least(0, max_length=self.max_length)
        at_least(-1, prefix_tokens=self.prefix_tokens)
        choice("kv_cache", self.kv_cache, KV_CACHES)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """The sizes of the chunks that prompts are read in."""
        step = max(-(-self.chunk // TAILS), LEAST)
        return *range(step, self.chunk, step), self.chunk

    def chunk_size(self, tokens: int) -> int:
        """The smallest of `chunk_sizes` that holds so many tokens."""
        return next(size for size in self.chunk_sizes if size >= tokens)


class Fitted(NamedTuple):
    """A plan for given models."""

    plan: Plan  # without defaults
    models: tuple[Model, ...]  # the model, and its draft if there is one
    layout: Layout
    ids: TokenIds
    shapes: Shapes
    whole: bool  # whether a prompt is read in one piece, which is neither scored nor shared
    cache_bytes: int  # of all caches, on all devices

    @property
    def programs(self) -> Programs:
        """The compiled programs of this plan."""
        return compiled(self.models, self.layout, self.ids, self.shapes)

    def check(self, request: Request) -> None:
        """Raises a `UserError` if the request can never be answered."""
        request.check(self.models[0].config, self.plan.max_length)
        if request.echo_scores and self.whole:
            raise UserError("a model that scores every token of a prompt",
                            "a prefix-LM or one with expert capacity", "leave it out",
                            where="echo_scores")
        if self.shapes.propose and request.sampling.repetition_penalty != 1:
            raise UserError("1 with a draft model", request.sampling.repetition_penalty,
                            "leave one of them out", where="repetition_penalty")


def fit(plan: Plan, lm: LM, draft: LM | None) -> Fitted:
    """Fits a plan to the models.

    Raises:
      UserError: a model is no decoder, or has fewer learned positions than the plan's rows; the
        draft has another tokenizer; or the caches do not fit into memory.
    """
    lms = [lm] if draft is None else [lm, draft]
    for one in lms:
        _check_decoder(one)
    if len({one.tokenizer and one.tokenizer.hash for one in lms}) > 1:
        raise UserError("a model with the same tokenizer", "another",
                        "train one on the same prepared data", "draft")
    if "huggingface" in lm.about:
        check_told(lm.about["huggingface"])
    propose = plan.propose if draft is not None else 0
    length = plan.max_length or min(lm.recipe.data.seq_len, DEFAULT_LENGTH)
    for one in lms:
        check_positions(one.model.config, length, "max_length", answer=propose)
    whole = any(map(_reads_whole_prompts, lms))
    if propose and lm.model.config.moe.experts and lm.model.config.moe.capacity:
        raise UserError("experts without a capacity, which depends on the tokens read at once",
                        lm.model.config.moe.capacity, "leave the draft out", "draft")
    chunk = length if whole else min(plan.chunk, length)
    slots = -(-(length + propose + bool(propose)) // chunk) * chunk
    kept = plan.slots * slots // 4 if plan.prefix_tokens < 0 else plan.prefix_tokens
    shapes = Shapes(plan.slots, slots, chunk, 0 if whole else -(-kept // chunk), propose)
    generator = (Generator(lm.model, lm.layout) if lm.tokenizer is None
                 else generator_of(lm.model, lm.layout, lm.reader))
    models = tuple(one.model.with_kv_cache(plan.kv_cache) for one in lms)
    cache_bytes = _check_memory(models, shapes)
    return Fitted(dataclasses.replace(plan, max_length=length, chunk=chunk), models,
                  generator.layout or lm.layout, generator.ids, shapes, whole, cache_bytes)


def _check_decoder(lm: LM) -> None:
    lm.need_vocabulary()
    if lm.model.config.family != "decoder":
        raise UserError("a decoder to serve", f"an {lm.model.config.family}",
                        "use lm.generate or lm.embed, which take a batch at a time")


def _reads_whole_prompts(lm: LM) -> bool:
    """Whether a prompt's tokens depend on later ones, so that it cannot be read in parts.

    In a prefix-LM a prompt sees itself in both directions. Experts with a capacity take the tokens
    that are read together.
    """
    moe = lm.model.config.moe
    return lm.model.prefix_lm or bool(moe.experts and moe.capacity)


def _check_memory(models: tuple[Model, ...], shapes: Shapes) -> int:
    """The bytes of all caches."""
    state, page, pool = jax.eval_shape(lambda: empty(models, shapes))

    def size(tree: Any) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    need = size((state, page, pool))
    devices = jax.local_device_count()
    if need > (have := device_memory() * devices):
        raise UserError(f"caches within the {have / 1e9:.1f} GB of memory", f"{need / 1e9:.1f} GB",
                        "lower slots, max_length or prefix_tokens", where="slots")
    return size((state.caches, page, pool))
