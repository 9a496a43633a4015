"""A tiny model with random weights and a tokenizer, and answers of an engine."""

import functools
import queue
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.lm import LM
from lmjax.models.model import build_model
from lmjax.serving.engine import Engine
from lmjax.serving.requests import Finished, Piece, Request
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.recipe import build_recipe

V = 300
SMALL = dict(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=24, init_std=0.5,
             embedding_std=0.3, vocab_size=V)


@functools.cache
def tokenizer():
    texts = ["Document 7 tells of the number 49.\n"] * 40
    return train_tokenizer(TokenizerConfig(vocab_size=V), texts)


def tiny_lm(mesh=None, devices=1, seed=0, objective="causal_lm", **keys) -> LM:
    """A model of random weights on some of the devices; `keys` are of `config.model`."""
    recipe = build_recipe({"model": SMALL | keys, "data": {
        "seq_len": 64, "tokenizer": {"vocab_size": V}, "objective": {"name": objective}}})
    model = build_model(recipe.model, vocab_size=0, platform="cpu", dtype=jnp.float32,
                        prefix_lm=objective == "prefix_lm")
    layout = make_layout(mesh or MeshConfig(), jax.devices()[:devices])
    made = jax.jit(model.init, out_shardings=layout.tree(model.axes, model.shapes))
    return LM(model, made(jax.random.key(seed)), layout, tokenizer(), recipe, {"step": 0})


class Answer(NamedTuple):
    pieces: list[Piece]
    end: Finished

    @property
    def ids(self) -> list[int]:
        return [piece.token for piece in self.pieces]


def ask(engine: Engine, requests: list[Request]) -> list[Answer]:
    """Submits all requests at once and waits for their answers."""
    boxes = [queue.Queue() for _ in requests]
    for request, box in zip(requests, boxes, strict=True):
        engine.submit(request, box.put)
    return [collect(box) for box in boxes]


def collect(box: queue.Queue) -> Answer:
    pieces = []
    while not isinstance(item := box.get(timeout=60), Finished):
        pieces.append(item)
    return Answer(pieces, item)
