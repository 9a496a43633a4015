"""What single tokens look like: the text that each adds, and labels for pictures."""

import codecs
from collections.abc import Sequence

import numpy as np

from lmjax.data.tokenizers import NamedIds, Tokenizer

# In labels, which stay on one line.
VISIBLE = str.maketrans({"\n": "\u21b5", "\t": "\u2192", "\r": "\u240d"})


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to that of the tokens before it; together the decoded text.

    A character of several tokens belongs to the last of them, and the others add "".
    """
    raw, lengths = tokenizer.surface(np.asarray(ids, np.int64))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ends = np.cumsum(lengths).tolist()
    return [decoder.decode(raw[end - length : end], final=i == len(ends) - 1)
            for i, (length, end) in enumerate(zip(lengths.tolist(), ends, strict=True))]


def labels(names: NamedIds, ids: Sequence[int]) -> list[str]:
    """A label for each token: its text or its name, or else its bytes or its id, all visible."""
    return [_label(names, int(i)).translate(VISIBLE) for i in ids]


def _label(names: NamedIds, i: int) -> str:
    if i >= names.tokenizer.vocab_size or i in names.ids.values():
        return names.decode([i])
    raw = names.tokenizer.surface(np.array([i]))[0]
    try:
        return raw.decode() or f"[{i}]"
    except UnicodeDecodeError:  # a part of a character
        return f"<{raw.hex().upper()}>"
