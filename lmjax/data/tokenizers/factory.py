"""Tokenizers from a config, from the bytes in a checkpoint, and from prepared data."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence

from etils import epath

from lmjax.data.tokenizers.base import Tokenizer
from lmjax.data.tokenizers.files import join_files
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.data.tokenizers.sentencepiece import (
    SentencePieceTokenizer,
    TokenizerConfig,
    train_tokenizer,
)
from lmjax.errors import UserError, first_line
from lmjax.runtime.sealed import AGAIN, read_listed, read_sealed

TokenizerFactory = Callable[[TokenizerConfig, Sequence[str]], Tokenizer]  # (config, texts)


def sentencepiece_tokenizer(config: TokenizerConfig, texts: Sequence[str]) -> Tokenizer:
    """Trains a tokenizer on `texts`, or reads the SentencePiece model at `config.path`.

    `training.pretrained.make_tokenizer` also reads the directories of runs and Hugging Face models.

    Raises:
      UserError: no SentencePiece model at `path`, another vocabulary size than `vocab_size`, or a
        vocabulary size that the texts do not support.
    """
    if not config.path:
        return train_tokenizer(config, texts)
    path = epath.Path(config.path)
    if not path.exists() or path.is_dir():
        got = "is a directory" if path.is_dir() else "does not exist"
        raise UserError("a SentencePiece model", f"{config.path!r}, which {got}",
                        "correct it, or leave it empty to train one", where="data.tokenizer.path")
    return check_vocab_size(config, SentencePieceTokenizer(path.read_bytes()))


def check_vocab_size(config: TokenizerConfig, tokenizer: Tokenizer) -> Tokenizer:
    """Returns `tokenizer`, or raises a UserError if `config.vocab_size` is not its size."""
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{tokenizer.vocab_size}, as {config.path} has", config.vocab_size,
                        f"set it to {tokenizer.vocab_size}", where="data.tokenizer.vocab_size")
    return tokenizer


def tokenizer_from_bytes(model: bytes) -> Tokenizer:
    """The tokenizer whose `to_bytes` gave these bytes."""
    if not model.startswith(b"{"):
        return SentencePieceTokenizer(model)
    made_of = json.loads(model)
    if made_of["kind"] == "sentencepiece":
        return SentencePieceTokenizer(base64.b64decode(made_of["model"]), join_files(made_of))
    return HuggingFaceTokenizer(model)


def prepared_tokenizer(directory: str) -> Tokenizer:
    """The tokenizer of a directory of prepared data.

    Raises:
      UserError: its file is missing or damaged, or is that of another tokenizer.
    """
    folder = epath.Path(directory)
    manifest = read_sealed(folder / "manifest.json")
    content = read_listed(folder, "tokenizer.model", manifest)
    wanted, where = manifest["tokenizer"]["hash"], str(folder / "tokenizer.model")
    try:
        tokenizer = tokenizer_from_bytes(content)
    except Exception as error:  # noqa: BLE001 - a damaged file makes its readers raise anything
        raise UserError(f"the tokenizer of hash {wanted[:12]}", first_line(error), AGAIN,
                        where=where) from error
    if tokenizer.hash != wanted:
        raise UserError(f"the tokenizer of hash {wanted[:12]}", tokenizer.hash[:12], AGAIN,
                        where=where)
    return tokenizer
