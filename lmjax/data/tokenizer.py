"""Tokenizers behind one interface: SentencePiece, set up so that every text comes back exactly, and Hugging Face's
tokenizer.json as it is.

Byte fallback covers characters outside the vocabulary; nothing is normalised; digits are split one by
one; a newline is a token of its own, so no token spans lines, and training may go line by line; runs
of spaces are tokens, as code needs. U+2581, which SentencePiece writes for a space and would turn
into one, is encoded as its three bytes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.config import at_least, choice
from lmjax.data.hashing import key_of, permute
from lmjax.data.packing import ramps
from lmjax.errors import UserError

SPACE = "\u2581"  # SentencePiece's own sign for a space
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
MODELS = ("bpe", "unigram")
_UNIT = re.compile(r" *[^ \n]+|\n| +")  # a word with the spaces before it
# The first is needed; the others name the special tokens.
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens.

    vocab_size: tokens, of which 260 are bytes and special ones.
    model: bpe or unigram.
    train_bytes: text that the tokenizer is trained on: a sample of whole documents of the training split.
    seed: of the sample.
    path: an existing one to use instead: a SentencePiece model, or the directory of a run, a checkpoint, or a Hugging
      Face model or tokenizer; vocab_size must then be its own.
    """

    vocab_size: int = 4096
    model: str = "bpe"
    train_bytes: int = 8_000_000
    seed: int = 0
    path: str = ""

    def __post_init__(self) -> None:
        at_least(8, vocab_size=self.vocab_size)
        at_least(1, train_bytes=self.train_bytes)
        choice("model", self.model, MODELS)


class Tokenizer:
    """Text to token ids and back.

    Args:
      model: a serialised SentencePiece model.
    Raises:
      ValueError: not such a model, or one without BOS and EOS.
    """

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer: expected a SentencePiece model, got {len(model)} bytes that are "
                             "none; correct the path") from error
        self.vocab_size: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        self.pad_id: int = max(self._sp.pad_id(), 0)  # never looked at: padding is masked
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("tokenizer: expected a BOS and an EOS token, got ids "
                             f"{self.bos_id}, {self.eos_id}; use a model that has both")
        self.prefix: tuple[int, ...] = (self.bos_id,)  # what stands before and behind a text that the model reads
        self.suffix: tuple[int, ...] = ()

    @staticmethod
    def from_bytes(model: bytes) -> Tokenizer:
        """The tokenizer, of whichever kind, that `to_bytes` gave these bytes."""
        return HuggingFaceTokenizer(model) if model.startswith(b"{") else Tokenizer(model)

    @classmethod
    def read(cls, directory: str) -> Tokenizer:
        """That of a directory of prepared data."""
        from etils import epath

        return cls.from_bytes((epath.Path(directory) / "tokenizer.model").read_bytes())

    def to_bytes(self) -> bytes:
        """All of it: a SentencePiece model, or JSON that names its kind."""
        return self._model

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the model, hex."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        if SPACE not in text:
            return self._sp.encode(text)
        parts = [self._sp.encode(part) for part in text.split(SPACE)]
        return parts[0] + [i for part in parts[1:] for i in [*self._space_ids, *part]]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[np.ndarray]:
        """Token ids of many texts, int32 each, on all cores; the result does not depend on their number.

        Words come again and again: where it makes no difference, each is encoded only once.
        """
        units = [_UNIT.findall(text) if self._by_unit else [text] for text in texts]
        number: defaultdict[str, int] = defaultdict()
        number.default_factory = number.__len__
        unit_U = np.fromiter(map(number.__getitem__, itertools.chain(*units)), np.int64)
        plain = self._sp.encode(["" if SPACE in u else u for u in number], num_threads=num_threads or os.cpu_count())
        ids = [self.encode(u) if SPACE in u else i for u, i in zip(number, plain, strict=True)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(itertools.chain(*ids), np.int32, int(lengths.sum()))
        length_U = lengths[unit_U]
        out = flat[ramps((np.cumsum(lengths) - lengths)[unit_U], length_U)]
        ends = np.concatenate([[0], np.cumsum(length_U)])[np.cumsum([0, *map(len, units)])]
        return [out[a:b] for a, b in itertools.pairwise(ends.tolist())]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Special tokens are nothing; bytes that are no UTF-8 become U+FFFD."""
        return self.surface(np.fromiter(ids, np.int64))[0].decode(errors="replace")

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` where they follow `before`."""
        return self.decode(ids)

    def surface(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """The UTF-8 bytes that token ids [n] stand for, and how many of them each one gives (int64 [n])."""
        blob, starts, lengths = self._surfaces
        return blob[ramps(starts[ids], lengths[ids])].tobytes(), lengths[ids]

    def lossy(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> int | None:
        """The number of the first text that its ids do not give back exactly, None if all do."""
        raw = [text.encode() for text in texts]
        got, lengths = self.surface(np.concatenate([*ids, np.zeros(0, np.int32)]))
        ends = np.cumsum([len(i) for i in ids], dtype=np.int64)
        per_text = np.diff(np.concatenate([[0], np.concatenate([[0], np.cumsum(lengths)])[ends]]))
        if got == b"".join(raw) and np.array_equal(per_text, [len(r) for r in raw]):
            return None
        return next(n for n, i in enumerate(ids) if self.surface(i)[0] != raw[n])

    @functools.cached_property
    def _by_unit(self) -> bool:
        """Whether a text's tokens are those of its units, one after the other: no piece reaches from one into the
        next, nothing happens to the text before, characters outside the vocabulary are bytes, and it is BPE, which
        merges by rank (whole scores): a unigram model's sums of scores round differently in a longer text."""
        sp, ids, probe = self._sp, range(self.vocab_size), "  a\t\ufb01 e\u0301\u3000 "
        pieces = [i for i in ids if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))]
        return (sp.normalize(probe) == probe.replace(" ", SPACE) and any(map(sp.is_byte, ids))
                and all(sp.get_score(i).is_integer() for i in pieces)
                and all(_UNIT.fullmatch(sp.id_to_piece(i).replace(SPACE, " ")) for i in pieces))

    @functools.cached_property
    def _space_ids(self) -> list[int]:
        return [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @functools.cached_property
    def _surfaces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = [self._surface_of(i) for i in range(self.vocab_size)]
        lengths = np.array([len(s) for s in table], np.int64)
        return np.frombuffer(b"".join(table), np.uint8), np.cumsum(lengths) - lengths, lengths

    def _surface_of(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if self._sp.is_control(i):
            return b""
        return "\ufffd".encode() if self._sp.is_unknown(i) else piece.replace(SPACE, " ").encode()


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that is a few JSON files. `prefix` and `suffix` are what its own rules put around a text.

    Args:
      model: `{"kind": "huggingface", "files": {name: text}}` as UTF-8.
    Raises:
      ValueError: no such JSON, or a tokenizer that names no token to end (or begin) a text with.
    """

    def __init__(self, model: bytes):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("tokenizer: expected the package tokenizers, which reads tokenizer.json, got none; "
                             "pip install lmjax[hf]") from None
        self._model = model
        try:
            self.files: dict[str, str] = json.loads(model)["files"]
            self._hf = tokenizers.Tokenizer.from_str(self.files[HF_FILES[0]])
            self._rules: dict[str, Any] = json.loads(self.files[HF_FILES[0]])
            named = {k: v for f in reversed(HF_FILES[1:]) for k, v in json.loads(self.files.get(f, "{}")).items()}
        except Exception as error:  # noqa: BLE001 - the package raises plain Exceptions
            raise ValueError(f"tokenizer: expected a tokenizer.json, got {str(error)[:200]}; fetch it again") from None
        self._hf.no_truncation()
        self._hf.no_padding()
        self.vocab_size = 1 + max(self._hf.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = {role: self._id(named.get(f"{role}_token")) for role in ("bos", "eos", "pad", "cls", "sep")}
        # A model without one of them uses the other for both, as GPT-2 does; BERT's stand at the same places.
        bos = next((ids[role] for role in ("bos", "cls", "eos") if ids[role] is not None), None)
        eos = next((ids[role] for role in ("eos", "sep", "bos") if ids[role] is not None), None)
        if bos is None or eos is None:
            raise ValueError("tokenizer: expected bos_token or eos_token in tokenizer_config.json, got neither; "
                             "name one")
        self.bos_id, self.eos_id, self.pad_id = bos, eos, ids["pad"] or 0
        bare, whole = self.encode("a"), self._hf.encode("a").ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.prefix, self.suffix = tuple(whole[:at]), tuple(whole[at + len(bare):])

    @classmethod
    def from_directory(cls, path: Path) -> HuggingFaceTokenizer:
        """Reads the files of a directory."""
        try:
            files = {name: (path / name).read_text(encoding="utf-8") for name in HF_FILES if (path / name).is_file()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected {HF_FILES[0]} and what belongs to it in UTF-8, got {error}; fetch the "
                             "directory again") from None
        return cls(json.dumps({"kind": "huggingface", "files": files}).encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without what belongs around it."""
        return self._hf.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[np.ndarray]:
        """Token ids of many texts, int32 each, on all cores."""
        return [np.array(e.ids, np.int32) for e in self._hf.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, by the tokenizer's own rules. Special tokens are nothing."""
        return self._hf.decode([int(i) for i in ids if i < self.vocab_size])

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` where they follow `before`: rules about a text's beginning do not apply to it."""
        start, whole = self.decode(before), self.decode([*before, *ids])
        return whole[len(start):] if whole.startswith(start) else self.decode(ids)

    def _id(self, token: Any) -> int | None:
        name = token.get("content") if isinstance(token, dict) else token
        return None if name is None else self._hf.token_to_id(name)

    @functools.cached_property
    def _special(self) -> set[int]:
        return {token["id"] for token in self._rules["added_tokens"] if token["special"]}

    @functools.cached_property
    def _byte_of(self) -> dict[str, int]:
        """GPT-2's letter for every byte, if this tokenizer writes bytes so."""
        decoder = self._rules.get("decoder") or {}
        if "ByteLevel" not in [part["type"] for part in [decoder, *decoder.get("decoders", ())] if "type" in part]:
            return {}
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in plain]
        return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}

    def _surface_of(self, i: int) -> bytes:
        piece = self._hf.id_to_token(i)
        if piece is None or i in self._special:
            return b""
        if self._byte_of and all(c in self._byte_of for c in piece):
            return bytes(self._byte_of[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


class NamedIds:
    """A tokenizer and names for the ids behind its own: names[i] stands for vocab_size + i, in a text as in an answer.

    vocab_size: with those.
    """

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str] = ()):
        self.tokenizer, self.names, self.vocab_size = tokenizer, names, tokenizer.vocab_size + len(names)
        self._ids = {name: tokenizer.vocab_size + i for i, name in enumerate(names)}
        self._name = re.compile(f"({'|'.join(map(re.escape, names))})")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text and of the names in it."""
        parts = self._name.split(text) if self.names else [text]
        return [i for part in parts for i in ([self._ids[part]] if part in self._ids else self.tokenizer.encode(part))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, and the names of the others."""
        size = self.tokenizer.vocab_size
        return "".join("".join(self.names[i - size] for i in run) if named else self.tokenizer.decode(run)
                       for named, run in itertools.groupby(ids, lambda i: i >= size))

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` where they follow `before`."""
        return self.decode(ids) if self.names else self.tokenizer.continuation(before, ids)


TokenizerFactory = Callable[[TokenizerConfig, Sequence[str]], Tokenizer]  # (config, texts)


def make_tokenizer(config: TokenizerConfig, texts: Sequence[str]) -> Tokenizer:
    """Trains a tokenizer on `texts`, or reads the SentencePiece model at `config.path`.

    `training.pretrained.make_tokenizer` also reads the directories of runs and Hugging Face models.

    Raises:
      UserError: no SentencePiece model at `path`, another vocabulary size than `vocab_size`, or a
        vocabulary size that the texts do not support.
    """
    from etils import epath

    if not config.path:
        return Tokenizer(train_model(config, texts))
    path = epath.Path(config.path).expanduser()
    if not path.exists() or path.is_dir():
        got = "is a directory" if path.is_dir() else "does not exist"
        raise UserError("a SentencePiece model, a directory with a tokenizer or a run",
                        f"{config.path!r}, which {got}",
                        "correct it, or leave it empty to train one", where="data.tokenizer.path")
    return check_vocab_size(config, Tokenizer(path.read_bytes()))


def check_vocab_size(config: TokenizerConfig, tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer of `config.path`, or raises a UserError if `vocab_size` is not its size."""
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{tokenizer.vocab_size}, as {config.path} has", config.vocab_size,
                        f"set it to {tokenizer.vocab_size}", where="data.tokenizer.vocab_size")
    return tokenizer


def train_model(config: TokenizerConfig, texts: Sequence[str]) -> bytes:
    """Trains a SentencePiece model on a seeded sample of the texts; the same bytes every time."""
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": config.model, "vocab_size": config.vocab_size,
        "pad_id": PAD_ID, "bos_id": BOS_ID, "eos_id": EOS_ID, "unk_id": UNK_ID,
        "byte_fallback": True, "normalization_rule_name": "identity",  # nothing is lost
        "add_dummy_prefix": False, "remove_extra_whitespaces": False,  # nor are spaces added or removed
        "split_digits": True, "allow_whitespace_only_pieces": True, "user_defined_symbols": ["\n"],
        "required_chars": SPACE,  # which a text of Chinese may lack, and whose bytes mean the sign itself
        "max_sentence_length": 1 << 30,  # longer lines would be left out in silence (default: 4192)
        "num_threads": 2,  # pinned: the model may depend on it
        "minloglevel": 2,
    }
    lines = sample_lines(texts, config.train_bytes, config.seed)
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].partition("] ")[2] or str(error).splitlines()[0]
        raise ValueError(f"data.tokenizer.vocab_size: expected a size that the training text supports, got "
                         f"{config.vocab_size} ({reason}); change it, or add text") from error
    return model.getvalue()


def sample_lines(texts: Sequence[str], budget: int, seed: int) -> Iterator[str]:
    """Lines of texts in a keyed random order, until `budget` UTF-8 bytes have been given."""
    for i in permute(np.arange(len(texts)), len(texts), key_of("tokenizer", seed)) if texts else ():
        for line in texts[i].split("\n"):
            if budget <= 0:
                return
            budget -= len(line.encode()) + 1
            if line and SPACE not in line and "\0" not in line:  # SentencePiece reads these two otherwise
                yield line


def word_tables(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """For every token, bool [V]: whether it begins outside a word, and whether it ends outside one.

    A word goes on from one token to the next where both sides of their border are letters or digits; a character of
    Chinese or Japanese is a word by itself. Tokens that are a byte of a character go on.
    """
    begins, ends = np.ones(tokenizer.vocab_size, bool), np.ones(tokenizer.vocab_size, bool)
    for i in range(tokenizer.vocab_size):
        text = tokenizer.surface(np.array([i]))[0].decode(errors="replace")
        if text:
            begins[i], ends[i] = not _in_word(text[0]), not _in_word(text[-1])
    return begins, ends


def _in_word(character: str) -> bool:
    alone = "\u2e80" <= character <= "\u9fff"  # CJK, kana
    return character == "\ufffd" or unicodedata.combining(character) > 0 or (character.isalnum() and not alone)
