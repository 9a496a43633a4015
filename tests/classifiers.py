"""A tiny model with the head of a task and random weights, saved as a checkpoint."""

import base64
import functools
import random

import jax
import jax.numpy as jnp

import lmjax
from lmjax.config import plain
from lmjax.data.tokenizers import TokenizerConfig, sentencepiece_tokenizer
from lmjax.lm import LM
from lmjax.models.model import build_model
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.recipe import build_recipe

WORDS = "lovely great fine awful grim dull a b c d e film plot".split()
LABELS = ["dull", "fine", "great"]


def sentence(seed, most=12):
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


@functools.cache
def tokenizer():
    texts = [sentence(i) for i in range(300)]
    return sentencepiece_tokenizer(TokenizerConfig(vocab_size=300), texts)


def make(folder, family="encoder", *, facts=None, head_kind="", model=None, **task):
    """Saves the model in `folder` and returns it; `model` and `task` are keys of the recipe."""
    pieces = tokenizer()
    if facts is None:
        facts = {} if task.get("kind") == "regression" else {"labels": LABELS, "counts": [1] * 3}
    mapping = {
        "model": {"family": family, "num_layers": 2, "embed_dim": 32, "num_heads": 4,
                  "mlp_dim": 48, "vocab_size": pieces.vocab_size, "init_std": 0.3,
                  **({"pooler": True, "mlp": "gelu", "use_bias": True, "positions": "learned",
                      "norm": "layernorm", "norm_position": "post", "embedding_norm": "own",
                      "token_types": 2} if family == "encoder" else {}), **(model or {})},
        "data": {"seq_len": 64}, "task": {"name": "classification", "head_kind": head_kind, **task}}
    recipe = build_recipe(mapping)
    mapping["model"]["head"] = plain(recipe.task.head(recipe.model, facts))
    recipe = build_recipe(mapping)
    device = jax.devices()[:1]
    built = build_model(recipe.model, vocab_size=0, platform="cpu", dtype=jnp.float32)
    params = jax.jit(built.init)(jax.random.key(0))
    about = {"task": facts, "recipe": plain(recipe), "versions": lmjax.versions(), "step": 7,
             "tokenizer": base64.b64encode(pieces.to_bytes()).decode(), "compute_dtype": "float32",
             "data": {"fingerprint": "", "next_row": 0, "tokens": {}}}
    lm = LM(built, params, make_layout(MeshConfig(), device), pieces, recipe, about)
    lm.save(folder)
    return lm
