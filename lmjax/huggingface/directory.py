"""A Hugging Face directory as a whole: config.json, safetensors, tokenizer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import at_least, choice
from lmjax.data.reading import Reader
from lmjax.data.tokenizers import Tokenizer
from lmjax.errors import UserError
from lmjax.huggingface.heads import TaskHead, read_head
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.packed_directories import (
    KEY,
    UNPACKED,
    PackedTensors,
    packed_tensors,
    quantization_of,
    read_packed,
)
from lmjax.huggingface.settings import (
    decided,
    kept_settings,
    model_type_of,
    passed_over,
    read_settings,
    write_settings,
)
from lmjax.huggingface.stored import (
    BUFFERS,
    one_of_each,
    plain_names,
    rows_for,
    without_further_layers,
)
from lmjax.huggingface.tensors import (
    DTYPE_CODES,
    INDEX,
    SINGLE,
    STORED_DTYPES,
    Entry,
    open_tensors,
    read_json,
    write_json,
    write_tensors,
)
from lmjax.huggingface.tokenizer_export import pad_of, write_tokenizer
from lmjax.huggingface.tokenizers import check_vocabulary, read_tokenizer
from lmjax.huggingface.weights import (
    check_tensors,
    read_tree,
    tensor_getter,
    tensor_shapes,
)
from lmjax.models.folding import folded
from lmjax.models.model import Model, ModelConfig, build_model
from lmjax.nn.module import Params
from lmjax.nn.packed import NOT_QUANTIZED, Quantization
from lmjax.nn.positions import SINUSOIDS
from lmjax.runtime.files import new_directory


@dataclasses.dataclass(frozen=True)
class HFModel:
    """A Hugging Face directory whose files have been checked; its weights are not read yet."""

    path: Path
    config: ModelConfig  # ours
    entries: Mapping[str, Entry]  # the stored tensors, by name
    tokenizer: Tokenizer | None
    # What a checkpoint of ours remembers about the import: config.json ("settings"),
    # generation_config.json ("generation") and the weights' "dtype".
    source: dict[str, Any]
    head: TaskHead | None  # of a task, in place of the vocabulary's
    untied: bool  # config.json ties the head to the embedding, and the files hold two that differ
    packed: PackedTensors | None = None  # of a directory whose linear layers are integers
    further: int = 0  # layers after the last, whose tensors are passed over

    @property
    def quantization(self) -> Quantization:
        """How its weights are packed."""
        return self.packed.quantization if self.packed else NOT_QUANTIZED


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a model is written as a Hugging Face directory."""

    model_type: str = ""  # of config.json; "" takes the first that can express the model
    dtype: str = ""  # of the stored tensors; "" takes that of the import, or else float32
    max_shard_bytes: int = 5_000_000_000  # limit of a weight file's size
    head: TaskHead | None = None  # what the model's head was trained for, if it has one

    def __post_init__(self) -> None:
        choice("model_type", self.model_type, ("", *MODEL_TYPES))
        choice("dtype", self.dtype, ("", "float32", "bfloat16", "float16"))
        at_least(1, max_shard_bytes=self.max_shard_bytes)


AS_IT_IS = ExportOptions()


def is_hf_directory(path: Path) -> bool:
    """Whether `path` holds a Hugging Face model, and not a run of lmjax."""
    config = path / "config.json"
    return config.is_file() and not (path / "checkpoints").exists() and (
        "model_type" in read_json(config))


def read_directory(path: Path) -> HFModel:
    """Reads everything except most of the weights, and checks that the files fit each other.

    Of the weights it reads only the tensors that a file may hold under two names.

    Raises:
      UserError: config.json asks for something that lmjax does not compute, a weight file is
        missing or damaged, or the tokenizer belongs to another model.
    """
    where = f"{path}/config.json"
    settings = read_json(path / "config.json")
    quantization, packed = quantization_of(settings, where), None
    told = settings.get(KEY) or {}
    settings = {key: value for key, value in settings.items() if key != KEY}
    model_type = model_type_of(settings, where)
    entries = plain_names(open_tensors(path), model_type, str(path))
    if unpack := UNPACKED.get(told.get("quant_method", "")):
        entries = unpack(entries, told, str(path))
    if quantization.weights:
        packed = packed_tensors(entries, quantization, str(path))
        entries = dict(packed.entries)
    present = {field: stored if name in entries else absent
               for field, (name, stored, absent) in model_type.present.items()}
    config = read_settings(settings, where, present)
    tied = config.tie_embeddings
    entries, further = without_further_layers(entries, model_type, config)
    entries, config = one_of_each(entries, model_type, config, str(path))
    tokenizer = read_tokenizer(path)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size, path)
    codes = {entry.dtype for entry in entries.values()} & set(STORED_DTYPES)
    generation = path / "generation_config.json"
    source = {
        "settings": settings,
        "dtype": next((name for name, code in DTYPE_CODES.items() if codes == {code}), "float32"),
        "generation": read_json(generation) if generation.exists() else {}}
    head = read_head(settings, MODEL_TYPES[model_type.name], where)
    if head and head.task == "classification" and config.family == "decoder" and tokenizer:
        _check_end(settings.get("pad_token_id"), tokenizer.suffix, where)
    return HFModel(path, config, entries, tokenizer, source, head,
                   tied and not config.tie_embeddings, packed, further)


def remarks(found: HFModel) -> list[tuple[str, str]]:
    """What was decided between files or settings that contradict each other, or passed over.

    Returns:
      Pairs of the file that a remark is about ("" for the directory), and the remark.
    """
    settings, told = found.source["settings"], []
    if unread := passed_over(settings):
        told.append(("config.json", f"passes over {', '.join(unread)}, which change nothing that "
                     "the model computes"))
    told += [("config.json", f"{line}, as in transformers") for line in decided(settings)]
    if (found.path / SINGLE).is_file() and (found.path / INDEX).is_file():
        told.append((SINGLE, f"it is read, and {INDEX} beside it is not, as in transformers"))
    if found.further:
        told.append(("", f"passes over the tensors of {found.further} further layers, which "
                     "predict tokens after the next, as in transformers"))
    if found.untied:
        told.append(("", "the head differs from the embedding that config.json ties it to; it is "
                     "loaded untied, as transformers does"))
    return told


def _check_end(pad: Any, suffix: Sequence[int], where: str) -> None:
    """Refuses padding that ends texts: `transformers` classifies at the last other token."""
    if suffix and suffix[-1] == pad:
        raise UserError(f"a pad_token_id other than {pad}, which ends every text", pad,
                        "give padding an id of its own, with which the model was trained", where)


def read_params(found: HFModel, model: Model, shardings: Params) -> Params:
    """Reads the weights, one tensor at a time, onto the devices that `shardings` names.

    Returns:
      The parameters of `model`, float32, or packed as its quantization says.

    Raises:
      UserError: a tensor is missing, not needed or of another shape.
    """
    model_type = model_type_of(found.source["settings"], str(found.path))
    table = rows_for(model_type, model.config)
    shapes = model.with_quantization(NOT_QUANTIZED).shapes
    check_tensors(found.entries, shapes, table, where=str(found.path),
                  ignore=(*model_type.ignore, *BUFFERS))
    if found.packed and model.quantization.weights:
        tensors = found.packed._replace(entries=found.entries)
        return read_packed(tensors, model, shardings, table, str(found.path))
    return read_tree(found.entries, model.shapes, shardings, table)


def write_directory(out: Path, model: Model, params: Params, reader: Reader | None, *,
                    options: ExportOptions = AS_IT_IS,
                    source: Mapping[str, Any] | None = None, max_positions: int = 0,
                    log: Callable[[str], None] = print) -> None:
    """Writes a model as a Hugging Face directory.

    `out` appears only when it is complete. Before that it is read back, and the logits of what was
    read must equal those of `params`.

    Args:
      out: the directory, which must not exist yet.
      model: the model.
      params: its parameters, float32.
      reader: how it reads a text, if it has a tokenizer.
      options: how it is written.
      source: `HFModel.source`, if the model was imported. Settings that change nothing about what
        the model computes are written as they were read.
      max_positions: length of the rows that the model was trained on, in tokens.
      log: prints a line for the user.

    Raises:
      UserError: `out` exists, no model type can express the model, or the logits differ.
    """
    source = source or {"settings": {}, "generation": {}, "dtype": "float32"}
    dtype = options.dtype or source["dtype"]
    model, params = _without_multipliers(model, params, log)
    if reader is not None and not source["settings"] and model.config.position_offset:
        model, params = _counted_from(pad_of(reader.names.tokenizer), model, params)
    config = model.config
    if config.positions == "rope" or config.positions in SINUSOIDS:
        # These positions have no end: a model of ours has as many as its rows had.
        given = config.max_positions if source["settings"] or not max_positions else 0
        config = dataclasses.replace(config, max_positions=max(given, max_positions))
    ours = write_settings(config, options.model_type or source["settings"].get("model_type", ""),
                          options.head)
    model_type = model_type_of(ours, "config.json")
    kept = kept_settings(source["settings"], model_type, options.head)
    # An imported model keeps its own special ids, also where a file leaves them to the class.
    ids = {} if reader is None or source["settings"] else _special_ids(reader, config.family, ours)
    generation = source["generation"] or (ids and {**ids, "do_sample": True})
    if options.head is not None:
        generation = {}
        if reader is not None and {**ids, **kept}.get("pad_token_id") is None:
            kept["pad_token_id"] = pad_of(reader.names.tokenizer)  # which ends no batch's texts
    with new_directory(out) as part:
        write_json(part / "config.json", {**ids, **kept, **ours, "torch_dtype": dtype})
        if generation:
            write_json(part / "generation_config.json", generation)
        table = rows_for(model_type, model.config)
        write_tensors(part, tensor_shapes(model.shapes, table), tensor_getter(params, table),
                      dtype=dtype, max_shard_bytes=options.max_shard_bytes)
        if reader is not None:
            generates = config.family == "decoder" and options.head is None
            write_tokenizer(part, reader, generates=generates,
                            types=getattr(config, "token_types", 0) > 1, log=log)
        _check_written(part, model, params, dtype)
    log(f"{out}: a {model_type.architecture} in {dtype}; read back, it has equal logits")


def _without_multipliers(model: Model, params: Params,
                         log: Callable[[str], None]) -> tuple[Model, Params]:
    """The same model with its parametrization folded into the weights; the logits are compared."""
    plain, weights = folded(model, params)
    if plain is not model:
        _check_equal("the folded weights", _logits(model, params), _logits(plain, weights))
        log(f"the multipliers of {model.config.parametrization} are folded into the weights")
    return plain, weights


def _counted_from(pad: int, model: Model, params: Params) -> tuple[Model, Params]:
    """The same model with the row of position 0 after row `pad`, as RoBERTa counts positions."""
    config, table = model.config, params["positions"]["table"]
    more = pad + 1 - config.position_offset
    if pad >= config.max_positions or not more or config.family != "encoder":  # not OPT
        return model, params
    table = jnp.pad(table, ((more, 0), (0, 0))) if more > 0 else table[-more:]
    config = dataclasses.replace(config, position_offset=pad + 1)
    device = next(iter(table.devices()))
    made = build_model(config, vocab_size=0, platform=device.platform, dtype=model.dtype)
    return made, {**params, "positions": {**params["positions"], "table": table}}


def _special_ids(reader: Reader, family: str, settings: Mapping[str, Any]) -> dict[str, int]:
    """The ids of special tokens that config.json and generation_config.json name, if trained here.

    Raises:
      UserError: the model type counts positions by a padding id that is another token.
    """
    tokenizer = reader.names.tokenizer
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
           "pad_token_id": pad_of(tokenizer)}
    if family == "encdec":
        ids["decoder_start_token_id"] = reader.start_id
    pad = settings.get("pad_token_id", ids["pad_token_id"])
    if pad != ids["pad_token_id"]:
        raise UserError(f"a tokenizer whose padding token is {pad}, by which transformers counts "
                        f"the positions of {settings['model_type']}", ids["pad_token_id"],
                        "train with such a tokenizer, or choose another model type",
                        "model_type")
    return ids


def _check_written(path: Path, model: Model, params: Params, dtype: str) -> None:
    """Compares the logits of `path`, read back, with those of `params` rounded to `dtype`.

    They may differ only by how two compiled programs round a sum.
    """
    found = read_directory(path)
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    again = build_model(found.config, vocab_size=0, platform=device.platform, dtype=jnp.float32)
    read = read_params(found, again, jax.tree.map(lambda x: x.sharding, params))
    _check_equal(str(path), _logits(model, _rounded(params, dtype)), _logits(again, read))


def _logits(model: Model, params: Params) -> np.ndarray:
    """The logits of two rows of random tokens, computed in float32."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8), dtype=np.int32)
    batch = {"tokens": tokens,
             "positions": np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8)),
             "segment_ids": np.ones((2, 8), np.int32)}
    batch |= {"encoder_tokens": tokens[::-1],
              "encoder_positions": batch["positions"],
              "encoder_segment_ids": batch["segment_ids"]}
    same = dataclasses.replace(model, dtype=jnp.dtype(jnp.float32))
    return np.asarray(jax.jit(same.logits)(params, batch))


def _check_equal(where: str, expected: np.ndarray, got: np.ndarray) -> None:
    off = np.abs(expected - got).max()
    if not off <= 1e-5 * np.abs(expected).max():  # also refuses NaN
        raise UserError("the logits of the checkpoint", f"others by up to {off:.2g}",
                        "nothing was exported, report this", where)


def _rounded(params: Params, dtype: str) -> Params:
    if dtype == "float32":
        return params
    return jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
