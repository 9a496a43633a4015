"""Cleaning: a table of named rules applied in order, then what is too short or an exact copy is dropped."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from lmjax.data.sources import Document

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufeff]")  # C0 but tab and newline, DEL, byte-order mark


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _control(text: str) -> str:
    return _CONTROL.sub("", text) if _CONTROL.search(text) else text


def _nfc(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


# A rule returns its argument itself where there is nothing to change: that is how changes are counted.
RULES: dict[str, Callable[[str], str]] = {
    "newlines": _newlines,  # \r\n and \r become \n
    "control": _control,  # NUL, other control characters and byte-order marks are dropped
    "nfc": _nfc,  # composed and decomposed accents become one spelling
}


class Cleaner:
    """Cleans documents one by one and counts: `changed` per rule, `removed` per reason.

    Args:
      rules: names of `RULES`, in order.
      min_chars: shorter documents are dropped, once cleaned.
      seen: digests of the texts so far; pass the same set on to find copies across sources.
    """

    def __init__(self, *, rules: Iterable[str], min_chars: int, seen: set[bytes] | None = None):
        self.rules, self.min_chars = tuple(rules), min_chars
        self.changed: Counter[str] = Counter(dict.fromkeys(self.rules, 0))
        self.removed: Counter[str] = Counter(too_short=0, duplicate=0)
        self._seen = set() if seen is None else seen

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            text = document.data
            for rule in self.rules:
                before, text = text, RULES[rule](text)
                self.changed[rule] += text is not before
            if (reason := self._reject(text)) is None:
                yield Document(document.id, text)
            else:
                self.removed[reason] += 1

    def _reject(self, text: str) -> str | None:
        if len(text) < max(self.min_chars, 1):
            return "too_short"
        digest = hashlib.sha256(text.encode()).digest()[:16]
        if digest in self._seen:
            return "duplicate"
        self._seen.add(digest)
        return None
