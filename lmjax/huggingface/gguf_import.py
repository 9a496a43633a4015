"""Reads a GGUF file as a Hugging Face directory: its weights unpacked, its tokenizer rebuilt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.tokenizers import HF_FILES
from lmjax.errors import UserError, first_line
from lmjax.huggingface.gguf_byte_level import byte_level
from lmjax.huggingface.gguf_names import (
    ARCHITECTURES,
    halved,
    heads_in,
    library,
    settings_of,
    tensor_namer,
)
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.settings import read_settings
from lmjax.huggingface.stored import rows_for
from lmjax.huggingface.tensors import write_json, write_tensors
from lmjax.huggingface.tokenizers import SENTENCEPIECE
from lmjax.huggingface.weights import tensor_shapes
from lmjax.models.model import build_model

# By architecture: the model type, and settings that GGUF leaves to the architecture.
MODEL_TYPE = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
ALWAYS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu"}, "qwen2": {"hidden_act": "silu"},
    "qwen3": {"hidden_act": "silu", "attention_bias": False},
    "gpt2": {"activation_function": "gelu_new"},
}
LLAMA, UNIGRAM, BYTE_LEVEL = "llama", "t5", "gpt2"  # kinds of tokenizers, as GGUF names them


class Rules(NamedTuple):
    """What a SentencePiece tokenizer does with a text before it splits it."""

    space_before: bool  # adds a space
    one_space: bool  # takes spaces at the ends away, and all but one within
    characters: bytes  # replaces characters: a compiled map of SentencePiece; empty: none


def to_directory(file: Path, out: Path) -> None:
    """Writes what a GGUF file holds as a Hugging Face directory, in float32.

    Args:
      file: the file.
      out: an empty directory.

    Raises:
      UserError: it is no GGUF file, is damaged, or holds a model or a tokenizer that lmjax does not
        read.
    """
    gguf = library()
    where = str(file)
    if not file.is_file():
        raise UserError("a GGUF file", "none", "check the path", where=where)
    try:
        reader = gguf.GGUFReader(where)
    except Exception as error:  # the package raises errors of many kinds for damaged files
        raise UserError("a whole GGUF file", f"one that fails: {first_line(error)}",
                        "fetch it again", where=where) from None
    told = {name: _exact(field.contents()) for name, field in reader.fields.items()}
    name = told.get("general.architecture")
    if name not in MODEL_TYPE:
        raise UserError(f"an architecture of {', '.join(MODEL_TYPE)}", repr(name),
                        "use the model's Hugging Face directory", where=where)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    settings = _settings(told, name, stored, where)
    write_json(out / "config.json", settings)
    _write_tokenizer(out, told, where)
    _write_weights(out, settings, stored, where)
    if template := told.get("tokenizer.chat_template"):
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def _exact(value: Any) -> Any:
    """A number as it was written: 1e-05, not the float64 nearest to its float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _settings(told: dict[str, Any], name: str, stored: dict[str, Any],
              where: str) -> dict[str, Any]:
    kind = MODEL_TYPE[name]
    scaling = told.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in stored:
        raise UserError("rotary positions without scaling", "scaled ones",
                        "use the model's Hugging Face directory", where=where)
    if told.get(f"{name}.expert_count"):
        raise UserError("a model without experts", "experts",
                        "use the model's Hugging Face directory", where=where)
    settings: dict[str, Any] = {"model_type": kind, "architectures": [
        MODEL_TYPES[kind].architecture], **ALWAYS[name]}
    for theirs, key in settings_of(kind).items():
        if (value := told.get(f"{name}.{key}")) is not None:
            settings[theirs] = value
    heads = settings.get("num_attention_heads", settings.get("n_head"))
    if heads is None:
        raise UserError(f"{name}.attention.head_count", "none", "fetch it again", where=where)
    if kind != "gpt2":
        settings.setdefault("num_key_value_heads", heads)
        settings["rope_theta"] = told.get(f"{name}.rope.freq_base", 10_000.0)
        settings["head_dim"] = told.get(f"{name}.attention.key_length",
                                        settings["hidden_size"] // heads)
        settings["attention_bias"] = "blk.0.attn_q.bias" in stored and kind == "llama"
    settings["vocab_size"] = int(stored["token_embd.weight"].shape[-1])
    settings["tie_word_embeddings"] = "output.weight" not in stored
    for role in ("bos", "eos"):
        if (found := told.get(f"tokenizer.ggml.{role}_token_id")) is not None:
            settings[f"{role}_token_id"] = found
    if kind == "qwen2":
        settings["use_sliding_window"] = False
    return settings


def _write_weights(out: Path, settings: dict[str, Any], stored: dict[str, Any],
                   where: str) -> None:
    gguf = library()
    config = read_settings(settings, where, {})
    model = build_model(config, vocab_size=0, platform=jax.default_backend(), dtype=jnp.float32)
    shapes = tensor_shapes(model.shapes, rows_for(MODEL_TYPES[settings["model_type"]], config))
    architecture = ARCHITECTURES[settings["model_type"]]
    name_of = tensor_namer(architecture, config.num_layers)
    if lost := sorted({name_of(name) for name in shapes} - set(stored)):
        raise UserError(f"the tensor {lost[0]}", "none", "fetch it again", where=where)
    if odd := sorted(set(stored) - {name_of(name) for name in shapes}):
        raise UserError(f"only tensors of a {settings['model_type']}", odd[0],
                        "use the model's Hugging Face directory", where=where)

    def get(name: str) -> np.ndarray:
        tensor = stored[name_of(name)]
        w = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        w = w.reshape([int(size) for size in tensor.shape[::-1]])
        if architecture.pairs and (heads := heads_in(name, settings)):
            w = halved(w, heads)
        w = w.T if name.endswith(architecture.transposed) else w
        if w.shape != shapes[name]:
            raise UserError(f"{name_of(name)} of shape {shapes[name]}", w.shape,
                            "fetch it again", where=where)
        return w

    write_tensors(out, shapes, get, dtype="float32", max_shard_bytes=5_000_000_000)


def _write_tokenizer(out: Path, told: dict[str, Any], where: str) -> None:
    def of(name: str, default: Any = None) -> Any:
        return told.get(f"tokenizer.ggml.{name}", default)

    kind, tokens = of("model"), of("tokens")
    lists = ("tokens", "merges") if kind == BYTE_LEVEL else ("tokens", "scores", "token_type")
    if kind in (LLAMA, UNIGRAM, BYTE_LEVEL) and (
            lost := next((name for name in lists if of(name) is None), "")):
        raise UserError(f"tokenizer.ggml.{lost}", "none", "fetch the file again", where=where)
    if kind in (LLAMA, UNIGRAM):
        model = _sentencepiece(tokens, of("scores"), of("token_type"), unigram=kind == UNIGRAM,
                               rules=Rules(bool(of("add_space_prefix", True)),
                                           bool(of("remove_extra_whitespaces", False)),
                                           bytes(of("precompiled_charsmap", ()))),
                               ids={role: of(f"{role}_token_id") for role in (
                                   "unknown", "bos", "eos", "padding")})
        (out / SENTENCEPIECE).write_bytes(model)
        write_json(out / HF_FILES[1], {"add_bos_token": bool(of("add_bos_token", kind == LLAMA)),
                                       "add_eos_token": bool(of("add_eos_token", False))})
    elif kind == BYTE_LEVEL:
        roles = {f"{role}_token": tokens[i] for role in ("bos", "eos") if (
            i := of(f"{role}_token_id")) is not None}
        byte_level(tokens, of("merges"), of("token_type"), of("pre", "gpt-2"), where,
                   roles.get("bos_token"), of("add_bos_token")).save(str(out / HF_FILES[0]))
        write_json(out / HF_FILES[1], {**roles, "tokenizer_class": "PreTrainedTokenizerFast",
                                       "clean_up_tokenization_spaces": False})
    else:
        raise UserError(f"a tokenizer of the kind {LLAMA}, {UNIGRAM} or {BYTE_LEVEL}", repr(kind),
                        "use the model's Hugging Face directory", where=where)


def _sentencepiece(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *,
                   unigram: bool, rules: Rules, ids: dict[str, int | None]) -> bytes:
    """A SentencePiece model with these pieces, whose kinds GGUF numbers as it does."""
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2

    made = schema.ModelProto()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        made.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = made.trainer_spec, made.normalizer_spec
    trainer.model_type = trainer.UNIGRAM if unigram else trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = 6 in kinds
    for field, role in (("unk_id", "unknown"), ("bos_id", "bos"), ("eos_id", "eos"),
                        ("pad_id", "padding")):
        found = ids[role]
        setattr(trainer, field, -1 if found is None else found)
    unknown = kinds.index(2) if 2 in kinds else 0
    trainer.unk_id = unknown
    trainer.unk_piece = tokens[unknown]
    for field, role in (("bos_piece", "bos"), ("eos_piece", "eos"), ("pad_piece", "padding")):
        if (found := ids[role]) is not None:
            setattr(trainer, field, tokens[found])
    normalizer.name = "user_defined" if rules.characters else "identity"
    normalizer.add_dummy_prefix = rules.space_before
    normalizer.remove_extra_whitespaces = rules.one_space
    normalizer.precompiled_charsmap = rules.characters
    normalizer.escape_whitespaces = True
    return bytes(made.SerializeToString())
