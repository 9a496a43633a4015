"""The interface of all tokenizers, with what it gives: exact surfaces, word borders, further ids.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lmjax.data.rows import ramps
from lmjax.data.tokenizers.files import named_tokens
from lmjax.errors import UserError

SPACE = "\u2581"  # the sign that SentencePiece writes for a space
MASKS = ("[MASK]", "<mask>")  # BERT's and RoBERTa's names for the token that hides others


class Tokenizer(abc.ABC):
    """Turns text into token ids and back.

    Attributes:
      vocab_size: number of token ids, with the special ones.
      bos_id, eos_id: ids of the tokens that begin and end a document.
      pad_id: id of the padding token; padding is masked, so the id never matters.
      prefix, suffix: ids that stand before and after a text that the model reads.
      middle, second_type: ids between two texts, and the kind of segment of the second.
      files: the directory that the tokenizer was read from: the bytes of each file, by its path.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    middle: tuple[int, ...] = ()
    second_type: int = 0
    files: Mapping[str, bytes]

    def __init__(self, model: bytes):
        self._model = model

    def to_bytes(self) -> bytes:
        """The whole tokenizer, as `tokenizer_from_bytes` reads it."""
        return self._model

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the model, hex."""
        return hashlib.sha256(self._model).hexdigest()

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, without special tokens around it.

        In a tokenizer of Hugging Face, the name of a special token in the text is that token, as
        in `transformers`.
        """

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], *,
                     num_threads: int | None = None) -> list[np.ndarray]:
        """Token ids of many documents, one int32 array each; names of special tokens are text.

        Args:
          texts: the documents.
          num_threads: by default one per core; the result does not depend on it.
        """

    @abc.abstractmethod
    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of every word of a text with single spaces between its words.

        A word keeps the space before it. The first word has one too in byte-level tokenizers, as
        in `transformers` with is_split_into_words=True.
        """

    def spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """Token ids of a text, as `encode` gives them, and the place of each in the text.

        Returns:
          (ids, the characters [begin, end) that each token stands for, int64 [n, 2]). A token that
          is some bytes of a character has that whole character.
        Raises:
          UserError: the tokens do not make up the text.
        """
        ids, data = self.encode(text), text.encode()
        raw, lengths = self.surface(np.array(ids, np.int64))
        lead = len(raw) - len(data)  # 1: a space that the tokenizer puts before a text
        if lead not in (0, 1) or raw[lead:] != data:
            raise UserError("a tokenizer whose tokens make up the text", "one that changes "
                            f"{text[:40]!r}", "use another one, such as one with a tokenizer.json")
        ends = np.maximum(np.cumsum(lengths) - lead, 0)
        begins = np.maximum(np.cumsum(lengths) - lengths - lead, 0)
        begun = np.cumsum((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)  # by each byte's end
        begun = np.concatenate([[0], begun, [len(text) + 1]])
        return ids, np.stack([begun[begins + 1] - 1, begun[ends]], axis=1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Special tokens are dropped; invalid UTF-8 becomes U+FFFD."""
        return self.surface(np.fromiter(ids, np.int64))[0].decode(errors="replace")

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` after `before`: rules for the start of a text do not apply to it."""
        start, whole = self.decode(before), self.decode([*before, *ids])
        return whole[len(start):] if whole.startswith(start) else self.decode(ids)

    def surface(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """The UTF-8 bytes of token ids [n], and the number of bytes of each id (int64 [n])."""
        blob, starts, lengths = self._surfaces
        return blob[ramps(starts[ids], lengths[ids])].tobytes(), lengths[ids]

    def changed(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> dict[int, str]:
        """The decoded texts that differ from what was encoded.

        Args:
          texts: what was encoded.
          ids: of each text, of `encode_batch`.
        Returns:
          the decoded text of each text that does not come back exactly, by its number.
        """
        raw = [text.encode() for text in texts]
        got, lengths = self.surface(np.concatenate([*ids, np.zeros(0, np.int32)]))
        ends = np.cumsum([len(i) for i in ids], dtype=np.int64)
        per_text = np.diff(np.concatenate([[0], np.concatenate([[0], np.cumsum(lengths)])[ends]]))
        if got == b"".join(raw) and np.array_equal(per_text, [len(r) for r in raw]):
            return {}
        decoded = map(self.decode, ids)
        return {n: found for n, (text, found) in enumerate(zip(texts, decoded, strict=True))
                if found != text}

    @functools.cached_property
    def _surfaces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes of all tokens end to end; where each token begins in them, and its length, [V]."""
        table = [self._surface_of(i) for i in range(self.vocab_size)]
        lengths = np.array([len(s) for s in table], np.int64)
        return np.frombuffer(b"".join(table), np.uint8), np.cumsum(lengths) - lengths, lengths

    @abc.abstractmethod
    def _surface_of(self, i: int) -> bytes:
        """The bytes of text that token `i` stands for."""

    @abc.abstractmethod
    def id_of(self, name: str, *, special: bool = False) -> int | None:
        """The id of the token with exactly this name; None if there is none.

        Args:
          name: as the vocabulary writes it.
          special: whether to look only at tokens that are no pieces of text.
        """

    def spans_with_specials(self, text: str) -> tuple[list[int], np.ndarray]:
        """Like `spans`, of a text in which the names of special tokens are these tokens."""
        return self.spans(text)

    @abc.abstractmethod
    def with_file(self, name: str, raw: bytes) -> Tokenizer:
        """The same tokenizer with one more file, or with another one of that name."""

    @property
    @abc.abstractmethod
    def special_names(self) -> dict[str, str]:
        """The names of special tokens by their roles in transformers: bos_token, eos_token, ..."""

    @functools.cached_property
    def mask_name(self) -> str | None:
        """The name of the tokenizer's own token for hidden tokens; None if it has none."""
        names = (named_tokens(self.files)["mask"], *MASKS)
        return next((name for name in names if name and self.id_of(name) is not None), None)


class NamedIds:
    """A tokenizer with names for ids, such as an objective's mask or sentinels.

    The names are read in texts and written into decoded texts.

    Args:
      tokenizer: the tokenizer of all ids below its vocab_size.
      ids: the id of each name, the tokenizer's own or a further one.
    Attributes:
      new: the names of further ids: those from tokenizer.vocab_size on, in order.
      vocab_size: number of ids, with the further ones.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Mapping[str, int] | None = None):
        self.tokenizer, self.ids = tokenizer, dict(ids or {})
        self._names = {i: name for name, i in self.ids.items()}
        self.new = tuple(self._names[i] for i in sorted(self._names) if i >= tokenizer.vocab_size)
        self.vocab_size = tokenizer.vocab_size + len(self.new)
        # The tokenizer reads its own added tokens, with its own rules for the spaces around them.
        split = [self._pattern(name, i) for name, i in self.ids.items()
                 if i not in tokenizer.encode(f"a{name}")]
        self._name = re.compile(f"({'|'.join(split)})") if split else None

    def _pattern(self, name: str, i: int) -> str:
        """Matches a name, with the space before it if that belongs to its token, as in mT5."""
        is_spaced = i == self.tokenizer.id_of(SPACE + name)
        return " ?" * is_spaced + re.escape(name)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text and of the names in it."""
        parts = self._name.split(text) if self._name else [text]  # every second part is a name
        named, ids = list(map(self._id_of, parts[1::2])), self.tokenizer.encode(text)
        if all(ids.count(i) == named.count(i) for i in named):
            return ids  # no name, or the tokenizer has read them all
        ids = self.tokenizer.encode(parts[0])
        for name, after in zip(named, parts[2::2], strict=True):
            ids += [name, *self.tokenizer.encode(after)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, with the name of each id that has one."""
        return self.continuation((), ids)

    def continuation(self, before: Sequence[int], ids: Iterable[int]) -> str:
        """The text of `ids` where they follow `before`."""
        text, seen = "", [i for i in before if i not in self._names]
        for is_named, run in itertools.groupby(ids, self._names.__contains__):
            part = [int(i) for i in run]
            if is_named:
                text += "".join(self._names[i] for i in part)
                # Any text: what follows a name is not the beginning, whose space is dropped.
                seen = seen or self.tokenizer.encode("a")
            else:
                text += self.tokenizer.continuation(seen, part)
                seen += part
        return text

    def _id_of(self, found: str) -> int:
        return self.ids[found if found in self.ids else found[1:]]


def word_tables(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """For each token, whether it begins outside a word and whether it ends outside one; bool [V].

    A word continues across the border of two tokens if the characters on both sides are letters or
    digits. Each Chinese or Japanese character is a word of its own. A token that is a single byte
    of a longer character is inside a word.
    """
    begins, ends = np.ones(tokenizer.vocab_size, bool), np.ones(tokenizer.vocab_size, bool)
    for i in range(tokenizer.vocab_size):
        text = tokenizer.surface(np.array([i]))[0].decode(errors="replace")
        if text:
            begins[i], ends[i] = not _in_word(text[0]), not _in_word(text[-1])
    return begins, ends


def _in_word(character: str) -> bool:
    if character == "\ufffd" or unicodedata.combining(character) > 0:
        return True
    cjk = "\u2e80" <= character <= "\u9fff"  # Han and kana
    return character.isalnum() and not cjk
