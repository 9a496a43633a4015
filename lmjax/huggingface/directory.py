"""A Hugging Face directory as a whole: config.json, safetensors, tokenizer."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.objectives import START_ID
from lmjax.data.tokenizers import Tokenizer
from lmjax.huggingface.families import FAMILIES, Family
from lmjax.huggingface.settings import family_of, read_settings, write_settings
from lmjax.huggingface.tensors import (
    DTYPES,
    NAMES,
    Entry,
    open_tensors,
    read_json,
    read_tensor,
    write_json,
    write_tensors,
)
from lmjax.huggingface.tokenizers import read_tokenizer, write_tokenizer
from lmjax.huggingface.weights import Table, check_tensors, read_tree, tensor_getter, tensor_shapes
from lmjax.models.model import Model, ModelConfig, build_model
from lmjax.nn.layers import MLP_KINDS
from lmjax.nn.module import Params
from lmjax.runtime.files import new_directory

MAX_PADDING = 0.05  # share of an embedding's rows that may be there only to make its size round


@dataclasses.dataclass(frozen=True)
class Found:
    """What a directory holds. config: ours. source: of the checkpoint's `about`, their settings and dtype."""

    path: Path
    config: ModelConfig
    entries: Mapping[str, Entry]
    tokenizer: Tokenizer | None
    source: dict[str, Any]


def is_hf_directory(path: Path) -> bool:
    """Whether there is a model there that was not written by lmjax's training."""
    return (path / "config.json").is_file() and not (path / "checkpoints").exists() and bool(
        "model_type" in read_json(path / "config.json"))


def read_directory(path: Path) -> Found:
    """Everything but the weights' values, checked against each other.

    Raises:
      ValueError: settings that we do not compute, tensors that do not fit them, or another model's tokenizer.
    """
    settings = read_json(path / "config.json")
    family = family_of(settings, f"{path}/config.json")
    entries = open_tensors(path)
    if family.prefix and not any(name.startswith(family.prefix) for name in entries):
        entries = {family.prefix + name: entry for name, entry in entries.items()}
    config = read_settings(settings, f"{path}/config.json", {
        field: there if name in entries else absent for field, (name, there, absent) in family.present.items()})
    tokenizer = read_tokenizer(path)
    if tokenizer is not None:
        _check_vocabulary(tokenizer, config.vocab_size, path)
    stored = {entry.dtype for entry in entries.values()} & set(DTYPES)
    dtype = next((name for name, code in NAMES.items() if stored == {code}), "float32")
    generation = path / "generation_config.json"
    source = {"settings": settings, "dtype": dtype, "generation": read_json(generation) if generation.exists() else {}}
    return Found(path, config, entries, tokenizer, source)


def read_params(found: Found, model: Model, shardings: Params) -> Params:
    """The weights, tensor by tensor, onto the devices that `shardings` names.

    Raises:
      ValueError: a tensor is missing, left over or of another shape.
    """
    family = FAMILIES[found.source["settings"]["model_type"]]
    ignore = family.ignore
    table = _table(family, model)
    tied = table.get("head/table")
    twice = bool(model.config.tie_embeddings and tied and tied.theirs in found.entries)
    check_tensors(found.entries, model.shapes, table, where=str(found.path),
                  ignore=(*ignore, tied.theirs) if twice else ignore)
    if twice:
        _check_tied(found, tied.theirs, table["embedding/table"].theirs)
    return read_tree(found.entries, model.shapes, shardings, table)


def write_directory(out: Path, model: Model, params: Params, tokenizer: Tokenizer | None, *, model_type: str = "",
                    dtype: str = "", max_shard_bytes: int = 5_000_000_000, source: Mapping[str, Any] | None = None,
                    max_positions: int = 0, log: Callable[[str], None] = print) -> None:
    """Writes `out`, which appears whole or not at all: it is read again and computes the same logits first.

    dtype: of the tensors; "" for that of the import, or float32. source: what `read_directory` found, whose
    settings are kept where ours have nothing to say. max_positions: length of the rows trained on.

    Raises:
      ValueError: `out` is there, no family computes this model, or what was written does not compute the same.
    """
    source = source or {"settings": {}, "generation": {}, "dtype": "float32"}
    dtype = dtype or source["dtype"]
    config = model.config
    if config.positions in ("rope", "sinusoidal"):
        # An own model has no more than it was trained on, whatever its config has room for.
        given = config.max_positions if source["settings"] or not max_positions else 0
        config = dataclasses.replace(config, max_positions=max(given, max_positions))
    ours = write_settings(config, model_type or source["settings"].get("model_type", ""))
    family = FAMILIES[ours["model_type"]]
    kept = {k: v for k, v in source["settings"].items() if k not in ("rope_parameters", "dtype")}
    ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if config.family == "encdec" and not source["settings"]:  # as the objectives have it
        ids |= {"pad_token_id": START_ID, "decoder_start_token_id": START_ID}
    with new_directory(out) as part:
        write_json(part / "config.json", {**ids, **kept, **ours, "torch_dtype": dtype})
        write_json(part / "generation_config.json", source["generation"] or {**ids, "do_sample": True})
        table = _table(family, model)
        write_tensors(part, tensor_shapes(model.shapes, table), tensor_getter(params, table),
                      dtype=dtype, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            write_tokenizer(part, tokenizer, log=log)
        _check_written(part, model, params, dtype)
    log(f"{out}: a {family.architecture} in {dtype}, read again with equal logits")


def _table(family: Family, model: Model) -> Table:
    return family.table if MLP_KINDS[model.config.mlp][1] else {**family.table, **family.ungated}


def _check_vocabulary(tokenizer: Tokenizer, rows: int, path: Path) -> None:
    size = tokenizer.vocab_size
    if size > rows or rows - size > max(128, MAX_PADDING * rows):
        raise ValueError(f"{path}: expected a tokenizer for an embedding of {rows} rows, got one of {size} tokens; "
                         "they belong to different models")


def _check_tied(found: Found, head: str, embedding: str) -> None:
    a, b = (read_tensor(found.entries[name]) for name in (head, embedding))
    if not np.array_equal(a, b):
        raise ValueError(f"{found.path}: expected {head} to equal {embedding}, as tie_word_embeddings=true says, got "
                         "others; set tie_word_embeddings to false in config.json")


def _check_written(path: Path, model: Model, params: Params, dtype: str) -> None:
    """Compares logits of what `path` reads as with those of `params` rounded to the file's dtype: they are equal, but
    for what two compilations may make of one sum."""
    found = read_directory(path)
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    again = build_model(found.config, vocab_size=0, platform=device.platform, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8), dtype=np.int32)
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8)),
             "segment_ids": np.ones((2, 8), np.int32)}
    batch |= {"encoder_tokens": tokens[::-1], "encoder_positions": batch["positions"],
              "encoder_segment_ids": batch["segment_ids"]}
    same = dataclasses.replace(model, dtype=jnp.dtype(jnp.float32))
    expected = np.asarray(jax.jit(same.logits)(_rounded(params, dtype), batch))
    read = read_params(found, again, jax.tree.map(lambda x: x.sharding, params))
    got = np.asarray(jax.jit(again.logits)(read, batch))
    off = np.abs(expected - got).max()
    if not off <= 1e-5 * np.abs(expected).max():  # or NaN
        raise ValueError(f"{path}: expected the logits of the checkpoint, got others by up to {off:.2g}; nothing was "
                         "exported, report this")


def _rounded(params: Params, dtype: str) -> Params:
    return params if dtype == "float32" else jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
