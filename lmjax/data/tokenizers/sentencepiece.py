"""SentencePiece tokenizers, set up so that every text comes back exactly, and their training.

Byte fallback covers characters outside the vocabulary. Nothing is normalised. Digits are split one
by one. A newline is a token of its own, so no token spans lines and training can go line by line.
Runs of spaces are tokens, as code needs. SentencePiece writes U+2581 for a space and would decode a
U+2581 of the text to a space, so U+2581 is encoded as its three bytes.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.config import PathText, at_least, choice
from lmjax.data.hashing import key_of, permute
from lmjax.data.rows import ramps
from lmjax.data.tokenizers.base import SPACE, Tokenizer
from lmjax.data.tokenizers.files import named_tokens, split_files, stated_ends
from lmjax.errors import UserError, first_line

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
MODELS = ("bpe", "unigram")
_UNIT = re.compile(r" *[^ \n]+|\n| +")  # a word with the spaces before it


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    vocab_size: int = 4096        # number of tokens; 260 of them are bytes and special tokens
    model: str = "bpe"            # bpe or unigram
    train_bytes: int = 8_000_000  # bytes of training text: whole documents of the training split
    seed: int = 0                 # of the sample
    # An existing tokenizer to use instead: a SentencePiece model, or the directory of a run, of a
    # checkpoint, or of a Hugging Face model or tokenizer. vocab_size must be its own.
    path: PathText = ""

    def __post_init__(self) -> None:
        at_least(8, vocab_size=self.vocab_size)
        at_least(1, train_bytes=self.train_bytes)
        choice("model", self.model, MODELS)


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer made of a SentencePiece model.

    Args:
      model: a serialised SentencePiece model.
      files: the other files of the directory that it was read from.
    Raises:
      UserError: the bytes are not such a model, or the model has no BOS or no EOS token.
    """

    def __init__(self, model: bytes, files: Mapping[str, bytes] | None = None):
        import sentencepiece

        super().__init__(model)
        self.files = dict(files or {})
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError("a SentencePiece model", f"{len(model)} bytes that are none",
                            "correct the path", where="tokenizer") from error
        self.vocab_size = self._sp.vocab_size()
        self.bos_id, self.eos_id = self._sp.bos_id(), self._sp.eos_id()
        self.pad_id = max(self._sp.pad_id(), 0)  # a model without a padding token says -1
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError("a BOS and an EOS token", f"ids {self.bos_id}, {self.eos_id}",
                            "use a model that has both", where="tokenizer")
        stated = stated_ends(self.files, self.bos_id, self.eos_id)
        self.prefix, self.suffix = stated or ((self.bos_id,), ())

    def to_bytes(self) -> bytes:
        """The model alone, or with the other files of its directory as a JSON object."""
        if not self.files:
            return self._model
        model = base64.b64encode(self._model).decode()
        return json.dumps({"kind": "sentencepiece", "model": model,
                           **split_files(self.files)}).encode()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        if SPACE not in text or self.adds_space:
            return self._sp.encode(text)
        parts = [self._sp.encode(part) for part in text.split(SPACE)]
        return parts[0] + [i for part in parts[1:] for i in [*self._space_ids, *part]]

    def encode_batch(self, texts: Sequence[str], *,
                     num_threads: int | None = None) -> list[np.ndarray]:
        """Token ids of many texts, one int32 array per text.

        Words recur, so each distinct word is encoded only once wherever that gives the same ids.
        """
        units = [_UNIT.findall(text) if self._by_unit else [text] for text in texts]
        number: defaultdict[str, int] = defaultdict()
        number.default_factory = number.__len__
        unit_U = np.fromiter(map(number.__getitem__, itertools.chain(*units)), np.int64)
        plain = self._sp.encode(["" if SPACE in u else u for u in number],
                                num_threads=num_threads or os.cpu_count())
        ids = [self.encode(u) if SPACE in u else i for u, i in zip(number, plain, strict=True)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(itertools.chain(*ids), np.int32, int(lengths.sum()))
        length_U = lengths[unit_U]
        out = flat[ramps((np.cumsum(lengths) - lengths)[unit_U], length_U)]
        ends = np.concatenate([[0], np.cumsum(length_U)])[np.cumsum([0, *map(len, units)])]
        return [out[a:b] for a, b in itertools.pairwise(ends.tolist())]

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of every word, which has the space before it; see `Tokenizer.encode_words`."""
        return [self.encode(word if i == 0 or self.adds_space else f" {word}")
                for i, word in enumerate(words)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without the space that the model puts before a text."""
        text = super().decode(ids)
        return text.removeprefix(" ") if self.adds_space else text

    def id_of(self, name: str, *, special: bool = False) -> int | None:
        """The id of the piece with exactly this name; see `Tokenizer.id_of`."""
        i: int = self._sp.piece_to_id(name)  # that of the unknown token if there is none
        found = self._sp.id_to_piece(i) == name and not self._sp.is_unknown(i)
        return i if found and (self._sp.is_control(i) or not special) else None

    def spans_with_specials(self, text: str) -> tuple[list[int], np.ndarray]:
        """Like `spans`, of a text in which the names of special tokens are these tokens."""
        names = [self._sp.id_to_piece(i) for i in range(self.vocab_size) if self._sp.is_control(i)]
        ids, spans, at = list[int](), [np.zeros((0, 2), np.int64)], 0
        for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
            whole = [self._sp.piece_to_id(part)], np.array([[0, len(part)]])
            its, places = whole if part in names else self.spans(part)
            ids += its
            spans.append(places + at)
            at += len(part)
        return ids, np.concatenate(spans)

    def with_file(self, name: str, raw: bytes) -> SentencePieceTokenizer:
        """The same tokenizer with another file."""
        return SentencePieceTokenizer(self._model, {**self.files, name: raw})

    @property
    def special_names(self) -> dict[str, str]:
        """The names that the files, or else the model, give to special tokens."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self._sp.pad_id(),
               "unk": self._sp.unk_id()}
        own = {role: self._sp.id_to_piece(i) for role, i in ids.items() if i >= 0}
        named = {role: name for role, name in named_tokens(self.files).items() if name}
        return {f"{role}_token": name for role, name in {**own, **named}.items()}

    @property
    def model(self) -> bytes:
        """The serialised model alone."""
        return self._model

    def pieces(self) -> list[str]:
        """The piece of each id."""
        return [self._sp.id_to_piece(i) for i in range(self.vocab_size)]

    @functools.cached_property
    def adds_space(self) -> bool:
        """Whether the model puts a space before a text, as Llama 2's does."""
        return self.surface(np.array(self._sp.encode("a")))[0] == b" a"

    @functools.cached_property
    def _by_unit(self) -> bool:
        """Whether the tokens of a text are the tokens of its units (`_UNIT`), one after the other.

        True if no piece reaches from one unit into the next, the model normalises nothing,
        characters outside the vocabulary become bytes, and the model is BPE, whose scores are whole
        numbers (ranks of merges). A unigram model adds scores, and in a longer text the sums round
        differently.
        """
        sp, ids, probe = self._sp, range(self.vocab_size), "  a\t\ufb01 e\u0301\u3000 "
        pieces = [i for i in ids if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))]
        return (not self.adds_space and sp.normalize(probe) == probe.replace(" ", SPACE)
                and any(map(sp.is_byte, ids))
                and all(sp.get_score(i).is_integer() for i in pieces)
                and all(_UNIT.fullmatch(sp.id_to_piece(i).replace(SPACE, " ")) for i in pieces))

    @functools.cached_property
    def _space_ids(self) -> list[int]:
        return [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def _surface_of(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if self._sp.is_control(i):
            return b""
        return "\ufffd".encode() if self._sp.is_unknown(i) else piece.replace(SPACE, " ").encode()


def train_tokenizer(config: TokenizerConfig, texts: Sequence[str]) -> SentencePieceTokenizer:
    """Trains a tokenizer on a seeded sample of the texts; equal arguments give an equal model.

    Raises:
      UserError: the texts do not support the vocabulary size.
    """
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": config.model, "vocab_size": config.vocab_size,
        "pad_id": PAD_ID, "bos_id": BOS_ID, "eos_id": EOS_ID, "unk_id": UNK_ID,
        "byte_fallback": True, "normalization_rule_name": "identity",  # nothing is lost
        "add_dummy_prefix": False, "remove_extra_whitespaces": False,  # spaces stay as they are
        "split_digits": True, "allow_whitespace_only_pieces": True, "user_defined_symbols": ["\n"],
        # Chinese text may lack spaces, and a space must not become the bytes of U+2581.
        "required_chars": SPACE,
        "max_sentence_length": 1 << 30,  # longer lines would be skipped silently (default: 4192)
        "num_threads": 2,  # pinned: the model may depend on it
        "minloglevel": 2,
    }
    lines = _sample_lines(texts, config.train_bytes, config.seed)
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model,
                                                 **settings)
    except RuntimeError as error:
        first = first_line(error)
        raise UserError("a size that the training text supports",
                        f"{config.vocab_size} ({first.partition('] ')[2] or first})",
                        "change it, or add text", where="data.tokenizer.vocab_size") from error
    return SentencePieceTokenizer(model.getvalue())


def _sample_lines(texts: Sequence[str], budget: int, seed: int) -> Iterator[str]:
    """Lines of the texts, in a keyed random order of texts, up to `budget` UTF-8 bytes."""
    for i in permute(np.arange(len(texts)), len(texts), key_of("tokenizer", seed)) if texts else ():
        for line in texts[i].split("\n"):
            if budget <= 0:
                return
            budget -= len(line.encode()) + 1
            if line and SPACE not in line and "\0" not in line:  # SentencePiece changes these two
                yield line
