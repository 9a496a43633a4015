"""Models of recipes with random weights, for the measurements that do not depend on the weights."""

import dataclasses

import jax

from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.model import Model, build_model
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.recipe import Recipe


def model_of(recipe: Recipe) -> Model:
    """The recipe's model, for the first device."""
    platform = jax.devices()[0].platform
    vocab_size = recipe.model.vocab_size or recipe.data.tokenizer.vocab_size
    return build_model(recipe.model, vocab_size=vocab_size, platform=platform,
                       dtype=recipe.train.dtype(platform))


def random_decoder(recipe: Recipe, *, wanted: str, example: str) -> LM:
    """The recipe's decoder on the first device, without a tokenizer.

    Args:
      wanted, example: for the error: what is measured, and a config that has it.

    Raises:
      UserError: it is no decoder.
    """
    if recipe.model.family != "decoder":
        raise UserError(wanted, f"an {recipe.model.family}", f"take another, such as {example}",
                        where="--config")
    model = model_of(recipe)
    return LM(model, jax.jit(model.init)(jax.random.key(0)),
              make_layout(MeshConfig(), jax.devices()[:1]), None,
              dataclasses.replace(recipe, model=model.config), {"step": 0})
