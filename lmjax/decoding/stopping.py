"""Answers as text during generation: streaming, and stop strings."""

from collections.abc import Callable, Sequence

from lmjax.data.tokenizers import NamedIds, Tokenizer


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the strings `stop`, and whether there was one."""
    found = [at for at in (text.find(s) for s in stop if s) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


class TextStream:
    """Passes the text of growing answers on, and ends a row at its first stop string.

    It is a `StopCheck` for `Generator`.
    """

    def __init__(self, tokenizer: Tokenizer | NamedIds, prompts: Sequence[Sequence[int]],
                 stop: Sequence[str], stream: Callable[[int, str], None] | None):
        """
        Args:
          prompts: token ids before each answer: the tokenizer's rules for the beginning of a text
            do not apply to an answer.
          stop: an answer ends before the first of these strings.
          stream: called with a row's number and the next piece of its text.
        """
        self.tokenizer, self.prompts, self.stop, self.stream = tokenizer, prompts, stop, stream
        self.shown = [0] * len(prompts)  # characters of each answer that were passed on

    def __call__(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Takes the answers so far and says for each row whether it is to end."""
        texts = [cut(self._text(row, ids), self.stop) for row, ids in enumerate(answers)]
        for row, (text, stopped) in enumerate(texts):
            # Held back: what may be the beginning of a stop string, or of a character that takes
            # several tokens.
            hold = 0 if stopped else max((len(s) - 1 for s in self.stop), default=0)
            ready = text[: len(text) - hold]
            self._show(row, ready if stopped else ready.rstrip("\ufffd"))
        return [stopped for _, stopped in texts]

    def finish(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Passes the rest of the final answers on, and returns their texts."""
        texts = [cut(self._text(row, ids), self.stop)[0] for row, ids in enumerate(answers)]
        for row, text in enumerate(texts):
            self._show(row, text)
        return texts

    def _text(self, row: int, ids: Sequence[int]) -> str:
        return self.tokenizer.continuation(self.prompts[row], ids)

    def _show(self, row: int, text: str) -> None:
        if self.stream and len(text) > self.shown[row]:
            self.stream(row, text[self.shown[row]:])
            self.shown[row] = len(text)
