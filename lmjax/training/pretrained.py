"""Finds existing models: in a run's directory, in one checkpoint, or in a Hugging Face directory.

Everything about a model is read before its weights, so that a model that does not fit is refused
before anything is compiled.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

import lmjax
from lmjax import huggingface
from lmjax.config import plain
from lmjax.data import tokenizers
from lmjax.data.objectives import ObjectiveConfig, mark_ids
from lmjax.data.reading import told_start
from lmjax.data.rows import START_ID
from lmjax.data.tokenizers import HF_FILES, Tokenizer, TokenizerConfig, tokenizer_from_bytes
from lmjax.errors import UserError, first_line
from lmjax.models.model import PROJECTION, Model, ModelConfig, build_model
from lmjax.models.packing import packed_shardings
from lmjax.nn.adapters import is_adapter, merge_adapters
from lmjax.nn.module import Params
from lmjax.nn.packed import Quantization
from lmjax.tasks.published import imported_task
from lmjax.training.best import best_step
from lmjax.training.checkpoint import About, checkpoint_steps, read_about, restore_params
from lmjax.training.checksums import checksums
from lmjax.training.recipe import Recipe, recorded_recipe
from lmjax.tree import join_trees, named_leaves, split_tree


class Pretrained(NamedTuple):
    """An existing model, whose weights `read` reads."""

    where: str
    recipe: Recipe  # of its run; of an imported model, only the model's config is its own
    tokenizer: Tokenizer | None
    about: About
    # (model, shardings) -> float32 parameters, streamed onto the devices of the shardings
    read: Callable[[Model, Params], Params]

    @property
    def quantization(self) -> Quantization:
        """How its weights are packed."""
        return Quantization(**self.about.get("quantization", {}))


def find(path: str | os.PathLike, *, step: int | str | None = None,
         ema: bool | None = None, base: str | os.PathLike = "") -> Pretrained:
    """Finds the model at `path`.

    Args:
      path: a run's directory, one checkpoint of a run (RUN/checkpoints/best is the best one), a
        Hugging Face directory, of a model or of an adapter of PEFT, or a model of the hub's local
        cache (its directory or its name).
      step: which checkpoint of a run: a number, or "best"; by default the newest.
      ema: whether to take the averaged weights; by default, if the run kept them.
      base: where the weights are that adapters were trained for; "": where they were then.

    Raises:
      UserError: there is no model, or one that lmjax cannot compute, or the base of adapters is
        not there.
    """
    if "://" not in str(path):
        path = huggingface.locate(path)
        if huggingface.is_hf_directory(path) or huggingface.is_peft_directory(path):
            if step is not None or ema:
                raise UserError("a run, which has steps and may have averaged weights",
                                "a Hugging Face directory", "leave step and ema out",
                                where=str(path))
            if huggingface.is_peft_directory(path):
                return _peft(path, base)
            return _huggingface(path)
    where = _checkpoint(path, step)
    about = read_about(where)
    has_ema = "ema" in about["checksums"]
    if ema and not has_ema:
        raise UserError("averaged weights", "a run with optimizer.ema_decay=0", "leave ema out",
                        where=str(where))
    name = "ema" if (has_ema if ema is None else ema) else "params"

    def read(model: Model, shardings: Params) -> Params:
        if "quantization" in about and not model.quantization.weights:
            return _unpacked(about, model, shardings, read)
        # A projection is read, and then left out.
        dim = about.get("projected_dim", 0)
        has_one = PROJECTION in about["checksums"][name]
        whole = model.with_projection(dim) if has_one else model
        # Of a run with adapters, the checkpoint holds these alone.
        shapes, _ = split_tree(whole.shapes, about["checksums"][name].__contains__)
        shardings, _ = split_tree(_placed_as(whole.shapes, shardings),
                                  about["checksums"][name].__contains__)
        params = restore_params(where, jax.tree.map(lambda shape, sharding: jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=sharding), shapes, shardings), name=name)
        return {key: leaf for key, leaf in params.items() if key != PROJECTION}

    found = Pretrained(str(where), recorded_recipe(about["recipe"]), _tokenizer(about), about, read)
    return _on_base(found, base) if "base" in about else found


def _unpacked(about: About, model: Model, shardings: Params,
              read: Callable[[Model, Params], Params]) -> Params:
    """Reads packed weights as the float32 parameters that they stand for."""
    quantization = Quantization(**about["quantization"])
    packed = model.with_quantization(quantization)
    params = read(packed, packed_shardings(model.functional, shardings, quantization))
    unpack: Callable[[Params], Params] = jax.jit(lambda params: packed.dense(params)[1],
                                                 out_shardings=shardings)
    return unpack(params)


def read_base(record: dict[str, Any], model: Model, shardings: Params, path: str | os.PathLike, *,
              fix: str, where: str) -> Params:
    """Reads the weights that adapters were trained for.

    Args:
      record: what a checkpoint says of them: their path, and their checksums by name. If these are
        not known yet, all weights of `model` are read, and the checksums are added.
      model: the model, without adapters; a task's head is its own and not one of the weights.
      shardings: of its parameters.
      path: where the weights are; "": where they were when the adapters were trained.
      fix: for error messages.
      where: the adapters, for error messages.

    Returns:
      Those of the parameters of `model` that `record` names.

    Raises:
      UserError: the weights are not there, or are others.
    """
    path = str(path or record["path"])
    wanted = f"the weights that its adapters were trained for at {path}"
    try:
        found = find(path)
        config = found.recipe.model
        theirs = build_model(config, vocab_size=config.vocab_size, platform="", dtype=model.dtype,
                             kernel=model.kernel)
        params = found.read(theirs, _placed_as(theirs.shapes, shardings))
    except UserError as error:
        raise UserError(wanted, f"none ({first_line(error)})", fix, where) from None
    names = record.get("checksums") or {name for name, _ in named_leaves(model.shapes)}
    params, _ = split_tree(params, lambda name: name in names)
    got = checksums(params)
    if record.setdefault("checksums", got) != got:
        raise UserError(wanted, "others", fix, where)
    return params


def _placed_as(shapes: Params, shardings: Params) -> Params:
    """A sharding for each of `shapes`: that of the same name, or whole on each of the devices."""
    known = dict(named_leaves(shardings))
    whole = NamedSharding(next(iter(known.values())).mesh, PartitionSpec())
    leaves = [known.get(name, whole) for name, _ in named_leaves(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def weights_id(found: Pretrained) -> str:
    """A text that changes with the weights; of a Hugging Face directory, with its files."""
    about = found.about
    kept = [about.get("checksums"), about.get("base", {}).get("checksums")]
    folders = [found.where, about.get("base", {}).get("path", "")]
    if not about.get("checksums") or huggingface.is_peft_directory(Path(found.where)):
        stats = [(path.name, path.stat()) for folder in folders if folder and "://" not in folder
                 for path in Path(folder).glob("*.safetensors")]
        kept += sorted([name, s.st_size, s.st_mtime_ns] for name, s in stats)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def make_tokenizer(config: TokenizerConfig, texts: Sequence[str]) -> Tokenizer:
    """Trains a tokenizer on `texts`, or reads the one at `config.path`, a file or a directory.

    `config.path` may be a SentencePiece model, or the directory of a run, of a checkpoint, or of a
    Hugging Face model or tokenizer, or the name of one in the hub's local cache.

    Raises:
      UserError: no tokenizer at `path`, another vocabulary size than `vocab_size`, or a vocabulary
        size that the texts do not support.
    """
    path = epath.Path(config.path)
    if config.path and "://" not in config.path:
        path = epath.Path(huggingface.in_cache(config.path))
    if config.path and not path.exists():
        raise UserError("a SentencePiece model, a directory with a tokenizer, a run or a name in "
                        "the hub's cache",
                        f"{config.path!r}, which does not exist",
                        "correct it, or leave it empty to train one", where="data.tokenizer.path")
    if not config.path or not path.is_dir():
        return tokenizers.sentencepiece_tokenizer(config, texts)
    if any((path / name).exists() for name in (huggingface.SENTENCEPIECE, HF_FILES[0])):
        tokenizer = huggingface.read_tokenizer(Path(path))
    elif not (path / "checkpoints").exists() and any(
            (path / name).exists() for name in huggingface.UNREAD):
        raise UserError("tokenizer.json or tokenizer.model", *huggingface.why_unread(Path(path)),
                        where=config.path)
    else:
        tokenizer = _tokenizer(read_about(_checkpoint(path, None)))
    if tokenizer is None:
        raise UserError("a model with a tokenizer", f"{config.path}, which was trained on "
                        "synthetic data", "use another", where="data.tokenizer.path")
    return tokenizers.check_vocab_size(config, tokenizer)


def check_start(found: Pretrained, config: ModelConfig, tokenizer: Tokenizer | None, *,
                has_adapters: bool = False) -> None:
    """Checks that a run may start from the weights of `found`.

    Args:
      found: the model to start from.
      config: of the run's model.
      tokenizer: that of the run's data; None: synthetic data.
      has_adapters: whether the run trains adapters.

    Raises:
      UserError: the models compute different functions, the tokenizers differ, or both have
        adapters.
    """
    if has_adapters and "base" in found.about:
        raise UserError("a model whose weights are its own", f"{found.where}, which has adapters",
                        "merge them: lmjax.load(DIR).merge().save(NEW), then start from NEW",
                        where="train.init_from")
    difference = huggingface.difference(config, found.recipe.model)
    if difference:
        field, ours, theirs = difference
        raise UserError(f"{theirs!r} as train.init_from={found.where} has", repr(ours),
                        "set it to that, or start from another model"
                        + ", or set train.change_rope=true" * field.startswith("rope_"),
                        where=f"config.model.{field}")
    if tokenizer and found.tokenizer and tokenizer.hash != found.tokenizer.hash:
        raise UserError(f"the tokenizer of the data ({tokenizer.hash[:12]})",
                        f"{found.where} with another ({found.tokenizer.hash[:12]})",
                        f"prepare the data with data.tokenizer.path={found.where}",
                        where="train.init_from")


def check_marks(found: Pretrained, objective: ObjectiveConfig, tokenizer: Tokenizer, *,
                key: str = "train.init_from") -> None:
    """Checks that a mask, modes and sentinels keep the ids that the rows of `found` had.

    Args:
      found: the model to start from.
      objective: of the run.
      tokenizer: that of the run's data.
      key: of the config that names `found`, for the error.

    Raises:
      UserError: `found` was trained here with another id for a name that the run uses.
    """
    if "huggingface" in found.about and "init_from" not in found.about:
        return  # it was trained elsewhere
    before = found.recipe.data.objective
    ours, theirs = ({name: i for ids in mark_ids(c, tokenizer.vocab_size, tokenizer)
                     for name, i in ids.items()} for c in (objective, before))
    if changed := [name for name in ours if theirs.get(name, ours[name]) != ours[name]]:
        name, fix = min(changed), f"set sentinels={before.sentinels} and its denoisers"
        if objective.own_ids != before.own_ids:
            fix = f"set own_ids={str(before.own_ids).lower()}"
        raise UserError(f"{name} as id {theirs[name]}, as {key}={found.where} was "
                        "trained with", f"id {ours[name]}", fix, where="config.data.objective")


def check_answers(found: Pretrained, *, key: str = "train.init_from") -> None:
    """Checks that the decoder of an imported model begins as rows of training do.

    key: of the config that names it, for the error.

    Raises:
      UserError: it is an encoder-decoder whose answers begin with another id.
    """
    if found.recipe.model.family != "encdec" or "huggingface" not in found.about:
        return
    start = told_start(found.about["huggingface"])
    if start is None:
        start = found.tokenizer.pad_id if found.tokenizer else START_ID
    if start != START_ID:
        raise UserError(f"an encoder-decoder whose answers begin with id {START_ID}, as the rows "
                        "of training do", f"decoder_start_token_id {start}", "train from random "
                        "weights, or from a model with that id, such as T5",
                        where=key)


def tokenizer_text(tokenizer: Tokenizer | None) -> str | None:
    """Returns the base64 text that checkpoints hold of a tokenizer."""
    return None if tokenizer is None else base64.b64encode(tokenizer.to_bytes()).decode()


def _tokenizer(about: About) -> Tokenizer | None:
    """Returns the tokenizer of a checkpoint, None if it was trained on synthetic data."""
    text = about["tokenizer"]
    return tokenizer_from_bytes(base64.b64decode(text)) if text else None


def _peft(path: Path, base: str | os.PathLike) -> Pretrained:
    found = huggingface.read_peft(path)
    place, fix = str(base or found.base), "say where it is with lmjax.load(path, base=...)"
    if not place:
        raise UserError("base_model_name_or_path", "none", fix, where=str(path))
    try:
        below = find(place)
    except UserError as error:
        raise UserError(f"the model that it is for at {place}", f"none ({first_line(error)})", fix,
                        where=str(path)) from None
    found, table = huggingface.on_base(found, below.recipe.model, below.about.get("huggingface"))
    recipe = dataclasses.replace(below.recipe, adapter=found.config)
    about = below.about | {"recipe": plain(recipe), "base": {
        "path": below.where, "step": below.about["step"]}}

    def read(model: Model, shardings: Params) -> Params:
        shapes, _ = split_tree(model.shapes, is_adapter)
        return huggingface.read_peft_params(found, table, shapes,
                                            split_tree(shardings, is_adapter)[0])

    return _on_base(Pretrained(str(path), recipe, below.tokenizer, about, read), place)


def _on_base(found: Pretrained, base: str | os.PathLike) -> Pretrained:
    """Returns `found`, whose `read` reads adapters alone, with the weights of their base.

    A model without adapters is given the base's weights with the adapters merged into them.
    """
    adapter = found.recipe.adapter

    def read(model: Model, shardings: Params) -> Params:
        adapted = model.with_adapters(adapter)
        weights = read_base(
            found.about["base"], model.plain, shardings, base, where=found.where,
            fix="bring them back, or say where they are with lmjax.load(path, base=...)")
        own = found.read(adapted, _placed_as(adapted.shapes, shardings))
        if adapted is model:
            return join_trees(weights, own)
        merge = jax.jit(lambda params: merge_adapters(params, adapter), out_shardings=shardings)
        return merge(join_trees(weights, own))

    return found._replace(read=read)


def _huggingface(path: Path) -> Pretrained:
    found = huggingface.read_directory(path)
    for file, line in huggingface.remarks(found):
        _tell(f"{path / file}: {line}")
    published = imported_task(found.head, found.config)
    recipe = recorded_recipe({"model": plain(found.config), "task": published.task,
                              "data": {"seq_len": found.config.max_positions,
                                       "objective": {"own_ids": True}}})
    about = ({} if published.facts is None else {"task": published.facts}) | {
        "recipe": plain(recipe),
        "data": {"fingerprint": "", "next_row": 0, "tokens": {}},
        "step": 0,
        "tokenizer": tokenizer_text(found.tokenizer),
        "versions": lmjax.versions(),
        "huggingface": found.source,
    }
    if found.quantization.weights:
        about["quantization"] = dataclasses.asdict(found.quantization)
    return Pretrained(str(path), recipe, found.tokenizer, about,
                      lambda model, shardings: huggingface.read_params(found, model, shardings))


@functools.cache  # a command may look at one directory several times
def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _checkpoint(path: str | os.PathLike, step: int | str | None) -> epath.Path:
    """Returns the directory of a checkpoint: `path` itself, or one of the run at `path`."""
    if isinstance(step, str) and step != "best":
        raise UserError('a number, or "best"', repr(step), "write one of these", where="step")
    where = epath.Path(path)
    if "://" not in str(path):
        where = where.absolute()  # Orbax takes no relative path
    if where.name == "best" and step is None and not where.exists():
        where, step = where.parent, "best"
    if (where / "about").exists():
        if step is not None and str(step) != where.name:
            raise UserError("a run's directory, which has several steps",
                            f"the checkpoint of step {where.name}", "leave the step out, or pass "
                            "the run's directory", where=str(where))
        return where
    directory = where / "checkpoints" if (where / "checkpoints").is_dir() else where
    steps = checkpoint_steps(directory)
    if step == "best":
        step = best_step(directory, steps)
    if not steps or (step is not None and step not in steps):
        raise UserError("a checkpoint" if step is None else f"checkpoint {step}", steps or "none",
                        "pass a run's directory, or one checkpoint of it", where=str(where))
    return directory / str(steps[-1] if step is None else step)
