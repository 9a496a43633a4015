"""The text of an answer while its tokens arrive: what was shown is never taken back."""

from collections.abc import Sequence
from typing import NamedTuple

from lmjax.data.tokenizers import NamedIds
from lmjax.decoding.stopping import cut

CONTEXT = 32  # tokens before a token that its text may depend on


class Shown(NamedTuple):
    """A further part of an answer."""

    text: str
    first: int  # the tokens whose text ends in it: [first, end) of the answer
    end: int


class GrowingText:
    """Decodes an answer in windows, so that a token costs the same after ten and ten thousand.

    Held back are the beginning of a character that takes several tokens, and what may become a
    stop string. The parts that are shown join to the whole text.
    """

    def __init__(self, names: NamedIds, before: Sequence[int], stop: Sequence[str] = ()):
        """
        Args:
          names: the tokenizer.
          before: ids of the prompt: rules for the beginning of a text do not apply to an answer.
          stop: the answer ends before the first of these strings.
        """
        self._names, self._stop = names, tuple(stop)
        self._before = self._last(before)
        self._window: list[int] = []
        self._base = ""  # the text before the window
        self.text = ""  # all that is certain
        self.ends: list[int] = []  # where the text ended after each token
        self.stopped = False  # whether a stop string ended the answer
        self._shown = self._shown_tokens = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Takes the next tokens. Where one ends is known only of the last of them."""
        if self.stopped or not tokens:
            return
        self._window += tokens
        decoded = self._names.continuation(self._before, self._window)
        certain = decoded.rstrip("\ufffd")
        self._grow(self._base + certain, len(tokens))
        if len(self._window) >= CONTEXT and certain == decoded:
            self._base = self.text
            self._before = self._last([*self._before, *self._window])
            self._window = []

    def finish(self) -> None:
        """No token follows: the rest is certain, too."""
        if not self.stopped:
            self._grow(self._base + self._names.continuation(self._before, self._window), 0)

    def take(self, *, last: bool = False) -> Shown:
        """What can be shown and was not yet.

        Args:
          last: everything, as no token follows.
        """
        last = last or self.stopped
        limit = len(self.text) - (0 if last else self._held())
        first, end = self._shown_tokens, self._shown_tokens
        while end < len(self.ends) and (last or self.ends[end] <= limit):
            end += 1
        if self.stopped:  # without the tokens of the stop string
            begins = [0, *self.ends]
            while end > first and begins[end - 1] >= limit:
                end -= 1
        text = self.text[self._shown : limit]
        if not text and not last:
            return Shown("", first, first)  # tokens without text go with the next part
        self._shown, self._shown_tokens = max(limit, self._shown), end
        return Shown(text, first, end)

    def _grow(self, text: str, count: int) -> None:
        longest = max(map(len, self._stop), default=0)
        at = max(len(self.text) - longest, 0)
        kept, self.stopped = cut(text[at:], self._stop)
        self.ends += [len(text)] * count
        self.text = text[:at] + kept

    def _held(self) -> int:
        """How many of the last characters may begin a stop string."""
        return max((size for stop in self._stop for size in range(1, len(stop))
                    if self.text.endswith(stop[:size])), default=0)

    def _last(self, ids: Sequence[int]) -> list[int]:
        """The last of these ids that a later token's text may depend on."""
        size = CONTEXT
        while size < len(ids) and not self._names.decode(ids[-size:]).rstrip("\ufffd"):
            size *= 2
        return list(ids[-size:])
