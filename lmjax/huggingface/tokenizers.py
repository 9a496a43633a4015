"""Tokenizers of Hugging Face directories, as lmjax reads them: which files decide, and as what.

tokenizer.json decides, as in `transformers`. tokenizer.model is read where it is alone, or where
tokenizer.json says the same, as in the directories that lmjax writes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.data.tokenizers import (
    HF_FILES,
    SPACE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    named_tokens,
)
from lmjax.errors import UserError, first_line
from lmjax.huggingface.added import ADDED, added_tokens, named_contents, stated_tokens
from lmjax.huggingface.tensors import read_json

SENTENCEPIECE = "tokenizer.model"
# What belongs to a tokenizer: kept at import and written at export, byte for byte.
FILES = (*HF_FILES, SENTENCEPIECE, ADDED, "chat_template.*", "chat_templates/*",
         "additional_chat_templates/*", "vocab.json", "merges.txt", "vocab.txt", "*.spm",
         "spiece.model", "sentencepiece.bpe.model")
# Tokenizers that only `transformers` knows how to put together.
UNREAD = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
          "source.spm")
WRITE_JSON = ("write tokenizer.json: python -c \"from transformers import AutoTokenizer as A; "
              "A.from_pretrained('{0}').save_pretrained('{0}')\"")
# An embedding may have this share of its rows, or 128, more than the tokenizer has tokens:
# padding that makes its size round.
MAX_PADDING = 0.05
MIN_PADDING = 128


def read_tokenizer(path: Path) -> Tokenizer | None:
    """Reads the tokenizer of a directory. Returns None if the directory has none that it can read.

    Ids for which the model of the directory has no row in its table do not exist.

    Raises:
      UserError: a tokenizer file is damaged, two files say different things, or reading them needs
        the package `tokenizers`, which is not installed.
    """
    files = {str(file.relative_to(path)): file.read_bytes()
             for pattern in FILES for file in sorted(path.glob(pattern)) if file.is_file()}
    whole, alone = HF_FILES[0] in files, SENTENCEPIECE in files and HF_FILES[0] not in files
    try:
        sentencepiece = None
        if SENTENCEPIECE in files:
            others = {name: raw for name, raw in files.items() if name != SENTENCEPIECE}
            try:
                sentencepiece = SentencePieceTokenizer(files[SENTENCEPIECE], others)
            except UserError:
                if alone:
                    raise
        if sentencepiece is not None and (alone or _same(sentencepiece)):
            if alone:
                _check_alone(sentencepiece, path)
            return sentencepiece
        if not whole:
            return None
        config = _config(path)
        (added, names), rows = added_tokens(files, config, str(path)), _rows(config)
        made = HuggingFaceTokenizer.from_files(files, added=added, names=names)
        if 0 < rows < made.vocab_size:
            check_vocabulary(made, rows, path)
            made = HuggingFaceTokenizer.from_files(files, rows=rows, added=added, names=names)
        _check_ends(made, path)
    except UserError as error:
        file = HF_FILES[0] if whole else SENTENCEPIECE
        known = str(path) in error.where
        raise error if known else UserError(
            error.expected, error.got, error.fix, where=str(path / file)) from None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError("files of a tokenizer as transformers writes them", first_line(error),
                        f"fetch {', '.join(files)} again", where=str(path)) from None
    return made


def check_vocabulary(tokenizer: Tokenizer, rows: int, path: Path) -> None:
    """Refuses a tokenizer whose size is far from the number of rows of the embedding."""
    size = tokenizer.vocab_size
    if abs(rows - size) > max(MIN_PADDING, MAX_PADDING * rows):
        raise UserError(f"a tokenizer for an embedding of {rows} rows", f"one of {size} tokens",
                        "they belong to different models", str(path))


def why_unread(path: Path) -> tuple[str, str]:
    """What a directory has in place of a tokenizer that lmjax reads, and what to do about it."""
    found = [name for name in UNREAD if (path / name).is_file()]
    if not found:
        return "none", f"copy {HF_FILES[0]} there"
    return f"{', '.join(found)} without {HF_FILES[0]}", WRITE_JSON.format(path)


def adds_space(tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer puts a space before a text."""
    return tokenizer.surface(np.array(tokenizer.encode("a")))[0] != b"a"


def _config(path: Path) -> dict[str, Any]:
    config = path / "config.json"
    return read_json(config) if config.is_file() else {}


def _rows(config: Mapping[str, Any]) -> int:
    """The rows of the table of the model with this config.json; 0 if it is not known."""
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else 0


def _same(tokenizer: SentencePieceTokenizer) -> bool:
    """Whether the tokenizer.json beside a SentencePiece model is the one that lmjax writes."""
    if HF_FILES[0] not in tokenizer.files or tokenizer.adds_space:
        return False
    try:
        rules: dict[str, Any] = json.loads(tokenizer.files[HF_FILES[0]])
        vocab, added = rules["model"]["vocab"], rules["added_tokens"]
        normalizer, split = rules["normalizer"], rules["pre_tokenizer"]
    except (ValueError, KeyError, TypeError):
        return False
    if isinstance(vocab, list):
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    pieces = tokenizer.pieces()
    plain = [token["content"] for token in added if not token["special"]]
    return (normalizer == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
            and split is None and vocab == {piece: i for i, piece in enumerate(pieces)}
            and {token["content"] for token in added} <= set(pieces) and plain == ["\n"]
            and _same_ends(tokenizer, pieces, rules.get("post_processor")))


def _same_ends(tokenizer: SentencePieceTokenizer, pieces: list[str], rule: Any) -> bool:
    """Whether a template puts those ids around a text that the SentencePiece model has there."""
    if not isinstance(rule, dict) or rule.get("type") != "TemplateProcessing":
        return True
    names = [part.get("SpecialToken", {}).get("id") for part in rule["single"]]
    return names == [*(pieces[i] for i in tokenizer.prefix), None,
                     *(pieces[i] for i in tokenizer.suffix)]


def _check_alone(tokenizer: SentencePieceTokenizer, path: Path) -> None:
    """Refuses what files beside a lone tokenizer.model say and the model does not."""
    pieces, files = tokenizer.pieces(), dict(tokenizer.files)
    extra = [token["content"] for i, token in stated_tokens(files).items()
             if pieces[i : i + 1] != [token["content"]]]
    extra += [name for name in named_contents(files) if name not in pieces]
    named = named_tokens(files)
    extra += [str(named[role]) for role, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
              if named[role] not in (None, pieces[i])]
    if extra:
        raise UserError(f"the tokens of {SENTENCEPIECE}, or {HF_FILES[0]}",
                        f"other files that add or name {', '.join(extra[:3])}",
                        WRITE_JSON.format(path), where=str(path))


def _check_ends(tokenizer: HuggingFaceTokenizer, path: Path) -> None:
    """Refuses a BOS or EOS token that the tokenizer, or the model's table, does not have."""
    named, names = named_tokens(tokenizer.files), tokenizer.names()
    for role in ("bos", "eos"):
        name = named[role]
        if name is not None and name not in names:
            raise UserError(f"an id for {role}_token", f"{name!r}, which has none below "
                            f"{tokenizer.vocab_size:,}", f"correct {HF_FILES[1]}, or add rows to "
                            "the model's table", where=str(path))
    high = max((*tokenizer.prefix, *tokenizer.suffix), default=0)
    if high >= tokenizer.vocab_size:
        raise UserError(f"ids below {tokenizer.vocab_size:,} around a text", f"{high:,}",
                        "use the tokenizer of this model", where=str(path))
