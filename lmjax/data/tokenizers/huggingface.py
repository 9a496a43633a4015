"""Tokenizers of Hugging Face: a tokenizer.json, used as it is through the package `tokenizers`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from lmjax.data.tokenizers.base import SPACE, Tokenizer
from lmjax.data.tokenizers.files import (
    HF_FILES,
    join_files,
    name_of,
    named_tokens,
    split_files,
    tokenizer_settings,
)
from lmjax.data.tokenizers.rules import drop_rows, hide_names
from lmjax.errors import UserError

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer made of a few JSON files; their own rules give `prefix` and `suffix`.

    Args:
      model: UTF-8 of a JSON object: `kind` is "huggingface"; `files` has the text of `HF_FILES`
        and `others` the remaining files of the directory. Where there are any: `added` has the
        tokens that other files add to tokenizer.json or give other flags, `names` the special
        tokens that no file names. `rows`, if it is smaller than the vocabulary, is the number of
        ids that the model has: later ones do not exist.
    Raises:
      UserError: the JSON is not a tokenizer, it names neither a BOS nor an EOS token, or the
        package `tokenizers` is not installed.
    """

    def __init__(self, model: bytes):
        super().__init__(model)
        try:
            self._made_of: dict[str, Any] = json.loads(model)
            self.files = join_files(self._made_of)
            self._rules: dict[str, Any] = json.loads(self.files[HF_FILES[0]])
            if added := self._made_of.get("added"):
                self._rules = _with_added(self._rules, added)
            if rows := self._made_of.get("rows"):
                self._rules = drop_rows(self._rules, rows)
            named = named_tokens(self.files, self._made_of.get("names", {}))
            self._hf = self._build(self._rules)
        except ImportError:
            raise UserError("the package tokenizers, which reads tokenizer.json", "none",
                            "pip install lmjax[hf]", where="tokenizer") from None
        except Exception as error:  # noqa: BLE001 - the package raises plain Exceptions
            raise UserError("a tokenizer.json", str(error)[:200], "fetch it again",
                            where="tokenizer") from None
        self.vocab_size = 1 + max(self._hf.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = {role: None if name is None else self._hf.token_to_id(name)
               for role, name in named.items()}
        # A model with only one of BOS and EOS uses it for both, as GPT-2 does. BERT's [CLS] and
        # [SEP] stand where BOS and EOS do.
        bos = next((ids[role] for role in ("bos", "cls", "eos") if ids[role] is not None), None)
        eos = next((ids[role] for role in ("eos", "sep", "bos") if ids[role] is not None), None)
        if bos is None or eos is None:
            raise UserError("bos_token or eos_token in tokenizer_config.json", "neither",
                            "name one", where="tokenizer")
        self.bos_id, self.eos_id, self.pad_id = bos, eos, ids["pad"] or 0
        bare, whole = self.encode("a"), self._hf.encode("a").ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.prefix, self.suffix = tuple(whole[:at]), tuple(whole[at + len(bare):])
        self.middle, self.second_type = self._between(bare)

    def _between(self, bare: list[int]) -> tuple[tuple[int, ...], int]:
        """The ids between two texts, and the kind of segment of the second; `bare`: of "a"."""
        pair = self._hf.encode("a", "a")
        ids, first = pair.ids, len(self.prefix) + len(bare)
        second = len(ids) - len(self.suffix) - len(bare)
        if ids[second : second + len(bare)] != bare or second < first:
            return (self.eos_id,), 0
        return tuple(ids[first:second]), pair.type_ids[second]

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], *, rows: int = 0,
                   added: Sequence[Mapping[str, Any]] = (),
                   names: Mapping[str, str] = MappingProxyType({})) -> HuggingFaceTokenizer:
        """Makes a tokenizer of the files of a directory, by their paths in it.

        Args:
          files: of them, `HF_FILES[0]` must be there.
          rows: number of ids that the model has; 0: all that the tokenizer has.
          added: tokens that are added to tokenizer.json, as that writes them, without ids.
          names: special tokens that no file names, such as {"eos_token": "</s>"}.
        """
        made_of: dict[str, Any] = {"kind": "huggingface", **split_files(files)}
        made_of |= {"added": [*map(_brief, added)]} if added else {}
        made_of |= {"names": dict(names)} if names else {}
        whole = cls(json.dumps(made_of).encode())
        if not 0 < rows < whole.vocab_size:
            return whole
        return cls(json.dumps({**made_of, "rows": rows}).encode())

    @functools.cached_property
    def hash(self) -> str:
        """sha256, hex, of what decides the ids; files that do not are left out."""
        decides = {key: value for key, value in self._made_of.items() if key != "others"}
        decides["files"] = {name: text.replace("\r\n", "\n").replace("\r", "\n")
                            for name, text in decides["files"].items()}
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def to_json(self) -> str:
        """One tokenizer.json with all that the files say, and only the ids that the model has."""
        return self._hf.to_str()

    def id_of(self, name: str, *, special: bool = False) -> int | None:
        """The id of the token with exactly this name; see `Tokenizer.id_of`."""
        i: int | None = self._hf.token_to_id(name)
        return i if i in self._added or not special else None

    def names(self) -> set[str]:
        """All pieces of the vocabulary, with the added tokens."""
        return set(self._hf.get_vocab(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; the name of a special token is that token."""
        return self._hf.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *,
                     num_threads: int | None = None) -> list[np.ndarray]:
        """Token ids of many documents, one int32 array each; always on all cores."""
        return [np.array(e.ids, np.int32)
                for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of every word, with the space before it if the rules do not add one."""
        texts = [word if word.startswith(" ") else self._before[i > 0] + word
                 for i, word in enumerate(words)]
        return [e.ids for e in self._hf.encode_batch(texts, add_special_tokens=False)]

    def spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """Token ids of a text, and the characters of each; see `Tokenizer.spans`."""
        encoded = self._hf.encode(text, add_special_tokens=False)
        return encoded.ids, np.array(encoded.offsets, np.int64).reshape(-1, 2)

    @functools.cached_property
    def _before(self) -> tuple[str, str]:
        """What stands before the first of several words, and before each of the others."""
        if self._byte_of:
            return " ", " "
        return "", "" if self.encode("a a") == 2 * self.encode("a") else " "

    def with_file(self, name: str, raw: bytes) -> HuggingFaceTokenizer:
        """The same tokenizer with another file."""
        made_of = {**self._made_of, **split_files({**self.files, name: raw})}
        return HuggingFaceTokenizer(json.dumps(made_of).encode())

    @property
    def special_names(self) -> dict[str, str]:
        """The names that the files give to special tokens."""
        names = self._made_of.get("names", {})
        found = {f"{role}_token": name for role, name in named_tokens(self.files, names).items()}
        found["unk_token"] = name_of(tokenizer_settings(self.files).get("unk_token"))
        return {role: name for role, name in found.items() if name is not None}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, by the tokenizer's own rules. Special tokens are dropped."""
        return self._hf.decode([int(i) for i in ids if i < self.vocab_size])

    def changed(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> dict[int, str]:
        """The decoded texts, by number, that differ from what was encoded."""
        decoded = self._hf.decode_batch([i.tolist() for i in ids])
        return {n: found for n, (text, found) in enumerate(zip(texts, decoded, strict=True))
                if found != text}

    def _build(self, rules: dict[str, Any]) -> Any:
        import tokenizers

        made = tokenizers.Tokenizer.from_str(json.dumps(rules))
        made.no_truncation()
        made.no_padding()
        return made

    @functools.cached_property
    def _plain(self) -> Any:
        """The tokenizer that reads the name of a special token as any other text."""
        made = self._build(hide_names(self._rules))
        made.encode_special_tokens = True
        return made

    @functools.cached_property
    def _added(self) -> dict[int, Any]:
        return dict(self._hf.get_added_tokens_decoder())

    @functools.cached_property
    def _special(self) -> set[int]:
        return {i for i, token in self._added.items() if token.special}

    @functools.cached_property
    def _byte_of(self) -> dict[str, int]:
        """The byte of each of GPT-2's letters for bytes; empty if the tokenizer has none."""
        decoder = self._rules.get("decoder") or {}
        parts = [decoder, *decoder.get("decoders", ())]
        if "ByteLevel" not in [part["type"] for part in parts if "type" in part]:
            return {}
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in plain]
        return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}

    def _surface_of(self, i: int) -> bytes:
        piece = self._hf.id_to_token(i)
        if piece is None or i in self._special:
            return b""
        model = self._rules["model"]
        if model.get("type") == "WordPiece":  # a piece without the sign begins a word
            sign = model["continuing_subword_prefix"]
            return (piece.removeprefix(sign) if piece.startswith(sign) else f" {piece}").encode()
        end = model.get("end_of_word_suffix") or ""
        piece, space = piece.removesuffix(end), " " * bool(end and piece.endswith(end))
        if self._byte_of and all(c in self._byte_of for c in piece):
            return bytes(self._byte_of[c] for c in piece) + space.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return (piece.replace(SPACE, " ") + space).encode()


def _with_added(rules: dict[str, Any], added: Sequence[Any]) -> dict[str, Any]:
    """Returns rules with more tokens, or other flags of theirs; a new one gets the next id."""
    from tokenizers import AddedToken, Tokenizer

    made = Tokenizer.from_str(json.dumps(rules))
    made.add_tokens([AddedToken(**_whole(token)) for token in added])
    return {**rules, "added_tokens": [
        {"id": i, "content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
        for i, token in sorted(made.get_added_tokens_decoder().items())]}


def _whole(token: Mapping[str, Any] | Sequence[Any]) -> Mapping[str, Any]:
    """A token with all its flags, from its brief form (name, is special)."""
    if isinstance(token, Mapping):
        return token
    name, special = token
    return {**dict.fromkeys(FLAGS, False), "content": name, "special": special,
            "normalized": not special}


def _brief(token: Mapping[str, Any]) -> Mapping[str, Any] | list[Any]:
    """A token's brief form, if that says all, so that the hash stays that of older versions."""
    brief = [token["content"], token["special"]]
    return brief if _whole(brief) == token else dict(token)
