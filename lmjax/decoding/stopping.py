"""Answers as text while they are being generated: streaming, and stop strings."""

from collections.abc import Callable, Sequence

from lmjax.data.tokenizers import NamedIds, Tokenizer


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the strings `stop`, and whether there was one."""
    found = [at for at in (text.find(s) for s in stop if s) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


class Watch:
    """Looks at a generator's answers as they grow: hands out their text, and says which have met a stop string."""

    def __init__(self, tokenizer: Tokenizer | NamedIds, prompts: Sequence[Sequence[int]], stop: Sequence[str],
                 stream: Callable[[int, str], None] | None):
        self.tokenizer, self.prompts, self.stop, self.stream = tokenizer, prompts, stop, stream
        self.shown = [0] * len(prompts)

    def __call__(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Which rows are to end."""
        texts = [cut(self._text(row, ids), self.stop) for row, ids in enumerate(answers)]
        for row, (text, stopped) in enumerate(texts):
            # What may yet become a stop string, or a character of several tokens, waits.
            hold = 0 if stopped else max((len(s) - 1 for s in self.stop), default=0)
            self._show(row, text[: len(text) - hold] if stopped else text[: len(text) - hold].rstrip("\ufffd"))
        return [stopped for _, stopped in texts]

    def finish(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The whole answers, the rest of which is handed out."""
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
