"""Writes a model as a GGUF file, for llama.cpp and what is built on it."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.data.reading import Reader
from lmjax.data.tokenizers import SentencePieceTokenizer
from lmjax.errors import UserError
from lmjax.huggingface.gguf_byte_level import SPLITS, byte_level
from lmjax.huggingface.gguf_names import (
    architecture_of,
    heads_in,
    library,
    paired,
    settings_of,
    tensor_namer,
)
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.settings import write_settings
from lmjax.huggingface.stored import rows_for
from lmjax.huggingface.tokenizer_export import PROBES, pad_of, rules_of
from lmjax.huggingface.weights import tensor_getter, tensor_shapes
from lmjax.models.model import Model
from lmjax.nn.module import Params

KINDS = ("f32", "f16", "q8_0", "q4_0")  # of tensors: as llama.cpp names them
BLOCK = 32  # weights that share a scale in q8_0 and q4_0
TABLES = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
NORMAL, UNKNOWN, CONTROL, USER, UNUSED = 1, 2, 3, 4, 5  # kinds of tokens, as SentencePiece's


@dataclasses.dataclass(frozen=True)
class GGUFOptions:
    """How a model is written as a GGUF file."""

    # Of the matrices, one of `KINDS`. In q8_0 and q4_0 each 32 weights have a scale of 16 bits; the
    # tables of tokens are q8_0 in both. A matrix whose inputs are no multiple of 32 is f16.
    kind: str = "f16"
    # By parameter, the step between neighbouring integers that each of its weights was rounded by,
    # so that the file holds these integers; None: weights are rounded for it.
    steps: Params | None = None
    source: Mapping[str, Any] | None = None  # `HFModel.source`, if the model was imported
    max_positions: int = 0  # length of the rows that the model was trained on, in tokens
    template: str = ""  # of chats; "": none


def write_gguf(out: Path, model: Model, params: Params, reader: Reader, options: GGUFOptions, *,
               log: Callable[[str], None] = print) -> None:
    """Writes a decoder as one file, which appears when it is complete.

    Args:
      out: the file.
      model: the model.
      params: its parameters, float32.
      reader: how it reads a text.
      options: how it is written.
      log: prints a line for the user.

    Raises:
      UserError: GGUF does not hold such a model or tokenizer.
    """
    gguf = library()
    config, kind = model.config, options.kind
    if config.family != "decoder" or config.head.outputs:
        raise UserError("a decoder that continues texts", "another model",
                        "export it as a Hugging Face directory", where="GGUF")
    imported = (options.source or {}).get("settings", {})
    if config.positions == "rope":
        given = config.max_positions if imported or not options.max_positions else 0
        config = dataclasses.replace(config, max_positions=max(given, options.max_positions))
    settings = write_settings(config, imported.get("model_type", ""), None)
    settings = {**imported, **settings}
    architecture = architecture_of(settings, "GGUF")
    table = rows_for(MODEL_TYPES[settings["model_type"]], config)
    shapes = tensor_shapes(model.shapes, table)
    name_of = tensor_namer(architecture, config.num_layers)
    get = tensor_getter(params, table)
    step = None if options.steps is None else tensor_getter(options.steps, table)
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(str(part), architecture.name)
    try:
        _add_settings(writer, architecture.name, settings, config, kind)
        _add_tokenizer(writer, reader, config.vocab_size, log)
        if options.template:
            writer.add_chat_template(options.template)
        kinds = {}
        for theirs, shape in shapes.items():
            shape = shape[::-1] if theirs.endswith(architecture.transposed) else shape
            kinds[theirs] = _add_tensor(writer, name_of(theirs), shape, _kind(theirs, shape, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for theirs in shapes:  # one at a time
            w, of_w = get(theirs), step(theirs) if step else None
            if theirs.endswith(architecture.transposed):
                w, of_w = w.T, of_w if of_w is None else of_w.T
            if architecture.pairs and (heads := heads_in(theirs, settings)):
                w, of_w = paired(w, heads), of_w if of_w is None else paired(of_w, heads)
            writer.write_tensor_data(encoded(w, kinds[theirs], of_w))
    except BaseException:
        writer.close()
        part.unlink(missing_ok=True)
        raise
    writer.close()
    part.replace(out)
    log(f"{out}: {architecture.name}, {kind}, {out.stat().st_size / 1e6:,.1f} MB")


def _add_tensor(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> str:
    """Adds a tensor to the list at the beginning of the file and returns its kind."""
    gguf = library()
    raw = gguf.GGMLQuantizationType[kind.upper()]
    block, size = gguf.GGML_QUANT_SIZES[raw]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw)
    return kind


def encoded(w: np.ndarray, kind: str, step: np.ndarray | None = None) -> np.ndarray:
    """A tensor [..., I] as it lies in a file.

    Args:
      kind: of `KINDS`.
      step: what one unit of each weight's integer is worth, the same within a block; None: a
        block's largest weight gets the largest integer.

    Returns:
      floats, or for q8_0 and q4_0 the bytes [..., I / 32 * bytes of a block].
    """
    if kind in ("f32", "f16"):
        if kind == "f16" and np.abs(w).max(initial=0) > np.finfo(np.float16).max:
            raise UserError("weights up to 65,504 for f16", f"{np.abs(w).max():g}", "write f32",
                            where="--kind")
        return np.ascontiguousarray(w, np.float32 if kind == "f32" else np.float16)
    largest = 127 if kind == "q8_0" else 7
    blocks = w.astype(np.float32).reshape(-1, BLOCK)
    if step is not None and step.any():
        steps = step.astype(np.float32).reshape(-1, BLOCK)
        if (steps != steps[:, :1]).any():
            raise UserError(f"groups that are multiples of {BLOCK} for {kind}", "smaller ones",
                            "write f16, or pack with another --group", where="--kind")
        scale = steps[:, 0]
    elif kind == "q4_0":  # of its 16 values, the lowest stands for the largest weight
        at = np.abs(blocks).argmax(1)[:, None]
        scale = np.take_along_axis(blocks, at, 1)[:, 0] / np.float32(-8)
    else:
        scale = np.abs(blocks).max(1) / largest
    safe = np.where(scale != 0, scale, 1)
    ints = np.clip(np.rint(blocks / safe[:, None]), -largest - (kind == "q4_0"),
                   largest).astype(np.int8)
    head = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind == "q8_0":
        body = ints
    else:
        low, high = np.split(ints + np.int8(8), 2, axis=1)
        body = low | (high << 4)
    return np.concatenate([head, body.view(np.uint8)], axis=1).reshape(*w.shape[:-1], -1)


def _kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1 or "wpe" in name:  # llama.cpp wants norms, biases and positions in float32
        return "f32"
    if kind in ("f32", "f16"):
        return kind
    if shape[-1] % BLOCK:
        return "f16"
    return "q8_0" if name.endswith(TABLES) else kind


def _add_settings(writer: Any, architecture: str, settings: Mapping[str, Any], config: Any,
                  kind: str) -> None:
    gguf = library()
    for theirs, name in settings_of(settings["model_type"]).items():
        value = settings.get(theirs)
        if value is None and theirs == "n_inner":
            value = 4 * settings["n_embd"]
        key = f"{architecture}.{name}"
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(key, value)
    if config.positions == "rope":
        dim = config.dims.head_dim
        writer.add_rope_dimension_count(dim)
        writer.add_key_length(dim)
        writer.add_value_length(dim)
        writer.add_rope_freq_base(float(config.rope_theta))
    writer.add_vocab_size(config.vocab_size)
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, reader: Reader, rows: int, log: Callable[[str], None]) -> None:
    tokenizer = reader.names.tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):
        _add_sentencepiece(writer, reader, tokenizer, rows)
    else:
        _add_byte_level(writer, tokenizer, rows, log)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(pad_of(tokenizer))
    writer.add_add_bos_token(bool(reader.prefix))
    writer.add_add_eos_token(bool(reader.suffix))


def _add_sentencepiece(writer: Any, reader: Reader, tokenizer: SentencePieceTokenizer,
                       rows: int) -> None:
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2
    model = schema.ModelProto.FromString(tokenizer.model)
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise UserError("a BPE tokenizer: llama.cpp reads a unigram's without its bytes", "unigram",
                        "export the model as a Hugging Face directory", where="GGUF")
    if model.normalizer_spec.precompiled_charsmap:
        raise UserError("a BPE tokenizer that reads characters as they are, as llama.cpp's does",
                        f"one that normalizes them ({model.normalizer_spec.name})",
                        "export the model as a Hugging Face directory", where="GGUF")
    texts = [piece.piece for piece in model.pieces]
    kinds, scores = [piece.type for piece in model.pieces], [p.score for p in model.pieces]
    # A newline of ours is a piece that is found anywhere.
    kinds = [USER if text == "\n" else kind for text, kind in zip(texts, kinds, strict=True)]
    names = {i: (name, USER) for name, i in reader.names.ids.items()}
    made, _ = rules_of(tokenizer)
    if made is not None:
        names |= {i: (token.content, CONTROL if token.special else USER)
                  for i, token in made.get_added_tokens_decoder().items()}
    for i in range(len(texts), rows):  # named ids of the model, and rows that no token has
        name, kind = names.get(i, (f"<unused_{i}>", UNUSED))
        texts.append(name)
        kinds.append(kind)
        scores.append(0.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
    writer.add_unk_token_id(kinds.index(UNKNOWN))


def _add_byte_level(writer: Any, tokenizer: Any, rows: int, log: Callable[[str], None]) -> None:
    made, _ = rules_of(tokenizer)
    described = json.loads(made.to_str()) if made is not None else {"model": {}}
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError("SentencePiece or byte-level BPE, which llama.cpp reads",
                        model.get("type", "another tokenizer"),
                        "export the model as a Hugging Face directory", where="GGUF")
    special = {token["id"]: token["special"] for token in described.get("added_tokens", [])}
    names = {i: name for name, i in made.get_vocab(with_added_tokens=True).items()}
    tokens = [names.get(i, f"<unused_{i}>") for i in range(rows)]
    kinds = [CONTROL if special.get(i) else USER if i in special else
             NORMAL if i in names else UNUSED for i in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pre = next((pre for pre in SPLITS
                if _splits_alike(made, byte_level(tokens, merges, kinds, pre))), None)
    if pre is None:
        raise UserError(f"a tokenizer that splits texts as one of {', '.join(SPLITS)}",
                        "another", "export the model as a Hugging Face directory", where="GGUF")
    log(f"llama.cpp splits texts by the rules that it calls {pre}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)


def _splits_alike(a: Any, b: Any) -> bool:
    return all(a.encode(text, add_special_tokens=False).ids
               == b.encode(text, add_special_tokens=False).ids for text in PROBES)
