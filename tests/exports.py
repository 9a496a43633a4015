"""A small model of ours, written as a Hugging Face directory."""

import json

import jax
import jax.numpy as jnp

from lmjax import huggingface
from lmjax.data.config import DataConfig
from lmjax.data.reading import make_reader
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model

CONFIG = DecoderConfig(num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24,
                       vocab_size=64, init_std=0.3)


def write(folder, config=CONFIG, *, max_positions=0, source=None, **options):
    model = build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0))
    huggingface.write_directory(
        folder, model, params, None, options=huggingface.ExportOptions(**options), source=source,
        max_positions=max_positions, log=lambda line: None)
    return model, params


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def reader(tokenizer, family="decoder", *, imported=False):
    """How a model with this tokenizer reads, trained here or imported."""
    about = {"huggingface": {"settings": {}, "generation": {}}} if imported else {}
    return make_reader(tokenizer, family, DataConfig(), about)
