"""Tokenizers of Hugging Face: a tokenizer.json, used as it is through the package `tokenizers`."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.data.tokenizers.base import SPACE, Tokenizer
from lmjax.errors import UserError

# The first file is required; the others name the special tokens.
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer made of a few JSON files; their own rules give `prefix` and `suffix`.

    Args:
      model: `{"kind": "huggingface", "files": {name: text}}` as UTF-8.
    Raises:
      UserError: the JSON is not a tokenizer, it names neither a BOS nor an EOS token, or the
        package `tokenizers` is not installed.
    """

    def __init__(self, model: bytes):
        super().__init__(model)
        try:
            import tokenizers
        except ImportError:
            raise UserError("the package tokenizers, which reads tokenizer.json", "none",
                            "pip install lmjax[hf]", where="tokenizer") from None
        try:
            self.files: dict[str, str] = json.loads(model)["files"]
            self._hf = tokenizers.Tokenizer.from_str(self.files[HF_FILES[0]])
            self._rules: dict[str, Any] = json.loads(self.files[HF_FILES[0]])
            named = {key: value for name in reversed(HF_FILES[1:])
                     for key, value in json.loads(self.files.get(name, "{}")).items()}
        except Exception as error:  # noqa: BLE001 - the package raises plain Exceptions
            raise UserError("a tokenizer.json", str(error)[:200], "fetch it again",
                            where="tokenizer") from None
        self._hf.no_truncation()
        self._hf.no_padding()
        self.vocab_size = 1 + max(self._hf.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = {role: self._id(named.get(f"{role}_token"))
               for role in ("bos", "eos", "pad", "cls", "sep")}
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

    @classmethod
    def from_directory(cls, path: Path) -> HuggingFaceTokenizer:
        """Reads the tokenizer's files in a directory."""
        try:
            files = {name: (path / name).read_text(encoding="utf-8")
                     for name in HF_FILES if (path / name).is_file()}
        except UnicodeDecodeError as error:
            raise UserError(f"{HF_FILES[0]} and what belongs to it in UTF-8", error,
                            "fetch the directory again", where=str(path)) from None
        return cls(json.dumps({"kind": "huggingface", "files": files}).encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return self._hf.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *,
                     num_threads: int | None = None) -> list[np.ndarray]:
        """Token ids of many texts, one int32 array per text; always on all cores."""
        return [np.array(e.ids, np.int32)
                for e in self._hf.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, by the tokenizer's own rules. Special tokens are dropped."""
        return self._hf.decode([int(i) for i in ids if i < self.vocab_size])

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` after `before`: rules for the start of a text do not apply to it."""
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
        if self._byte_of and all(c in self._byte_of for c in piece):
            return bytes(self._byte_of[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()
