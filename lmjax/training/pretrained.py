"""Models that are there already: a run's directory, one of its checkpoints, or a Hugging Face directory.

What is known of one comes before its weights, so that whoever wants them can refuse it before anything is compiled.
"""

import base64
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from etils import epath

import lmjax
from lmjax import huggingface
from lmjax.config import plain
from lmjax.data import tokenizers
from lmjax.data.tokenizers import HF_FILES, Tokenizer, TokenizerConfig, tokenizer_from_bytes
from lmjax.errors import UserError
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.training.checkpoint import About, checkpoint_steps, read_about, restore_params
from lmjax.training.recipe import Recipe, build_recipe


class Pretrained(NamedTuple):
    """What is known of a model. recipe: of its run (of an imported one: its model alone). read: (model, shardings) ->
    its float32 parameters, streamed onto the devices of the shardings."""

    where: str
    recipe: Recipe
    tokenizer: Tokenizer | None
    about: About
    read: Callable[[Model, Params], Params]


def find(path: str | os.PathLike, *, step: int | None = None, ema: bool | None = None) -> Pretrained:
    """The model at `path`.

    Args:
      step: which checkpoint of a run; the newest by default.
      ema: whether to take the averaged weights; by default they are taken if the run kept them.

    Raises:
      ValueError: nothing there, or a model that lmjax does not compute.
    """
    if "://" not in str(path) and huggingface.is_hf_directory(Path(path).expanduser()):
        return _huggingface(Path(path).expanduser())
    where = _checkpoint(path, step)
    about = read_about(where)
    has_ema = "ema" in about["checksums"]
    if ema and not has_ema:
        raise ValueError(f"{where}: expected averaged weights, got a run with optimizer.ema_decay=0; leave ema out")
    name = "ema" if (has_ema if ema is None else ema) else "params"

    def read(model: Model, shardings: Params) -> Params:
        return restore_params(where, jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), model.shapes, shardings),
            name=name)

    return Pretrained(str(where), build_recipe(about["recipe"]), _tokenizer(about), about, read)


def make_tokenizer(config: TokenizerConfig, texts: Sequence[str]) -> Tokenizer:
    """As `data.tokenizers.make_tokenizer`; `config.path` may be the directory of a model as well.

    Raises:
      UserError: no tokenizer at `path`, another vocabulary size than `vocab_size`, or a vocabulary
        size that the texts do not support.
    """
    path = epath.Path(config.path).expanduser()
    if not config.path or not path.is_dir():
        return tokenizers.make_tokenizer(config, texts)
    is_hf = any((path / name).exists() for name in (huggingface.SENTENCEPIECE, HF_FILES[0]))
    tokenizer = huggingface.read_tokenizer(Path(path)) if is_hf else _tokenizer(read_about(_checkpoint(path, None)))
    if tokenizer is None:
        raise UserError("a model with a tokenizer", f"{config.path}, which was trained on synthetic data",
                        "use another", where="data.tokenizer.path")
    return tokenizers.check_vocab_size(config, tokenizer)


def check_start(found: Pretrained, model: Model, tokenizer: Tokenizer | None) -> None:
    """Refuses to start a run of `model` on data of `tokenizer` (None: synthetic) with the weights that were found.

    Raises:
      ValueError: that model computes something else, or reads other tokens.
    """
    difference = huggingface.difference(model.config, found.recipe.model)
    if difference:
        field, ours, theirs = difference
        raise ValueError(f"config.model.{field}: expected {theirs!r} as train.init_from={found.where} has, got "
                         f"{ours!r}; set it to that, or start from another model")
    if tokenizer and found.tokenizer and tokenizer.hash != found.tokenizer.hash:
        raise ValueError(f"train.init_from: expected the tokenizer of the data ({tokenizer.hash[:12]}), got "
                         f"{found.where} with another ({found.tokenizer.hash[:12]}); prepare the data with "
                         f"data.tokenizer.path={found.where}")


def tokenizer_text(tokenizer: Tokenizer | None) -> str | None:
    """Returns a tokenizer as the text that checkpoints hold, base64."""
    return None if tokenizer is None else base64.b64encode(tokenizer.to_bytes()).decode()


def _huggingface(path: Path) -> Pretrained:
    found = huggingface.read_directory(path)
    recipe = build_recipe({"model": plain(found.config), "data": {"seq_len": found.config.max_positions}})
    tokenizer = found.tokenizer
    about = {"recipe": plain(recipe), "data": {"fingerprint": "", "next_row": 0, "tokens": {}}, "step": 0,
             "tokenizer": tokenizer_text(tokenizer),
             "versions": lmjax.versions(), "huggingface": found.source}
    return Pretrained(str(path), recipe, tokenizer, about,
                      lambda model, shardings: huggingface.read_params(found, model, shardings))


def _checkpoint(path: str | os.PathLike, step: int | None) -> epath.Path:
    where = epath.Path(path)
    if "://" not in str(path):
        where = where.expanduser().absolute()  # Orbax takes no relative path
    if (where / "about").exists():
        return where
    directory = where / "checkpoints" if (where / "checkpoints").is_dir() else where
    steps = checkpoint_steps(directory)
    if not steps or (step is not None and step not in steps):
        raise ValueError(f"{where}: expected {'a checkpoint' if step is None else f'checkpoint {step}'}, got "
                         f"{steps or 'none'}; pass a run's directory, or one checkpoint of it")
    return directory / str(steps[-1] if step is None else step)


def _tokenizer(about: About) -> Tokenizer | None:
    return tokenizer_from_bytes(base64.b64decode(about["tokenizer"])) if about["tokenizer"] else None
