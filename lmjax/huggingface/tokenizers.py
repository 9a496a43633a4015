"""Tokenizers of Hugging Face directories, as lmjax reads them."""

from pathlib import Path

from lmjax.data.tokenizers import HF_FILES, HuggingFaceTokenizer, Tokenizer, tokenizer_from_bytes
from lmjax.errors import UserError

SENTENCEPIECE = "tokenizer.model"


def read_tokenizer(path: Path) -> Tokenizer | None:
    """Reads the tokenizer of a directory. Returns None if the directory has none.

    Raises:
      UserError: a tokenizer file is damaged, or reading it needs the package `tokenizers`, which
        is not installed.
    """
    sentencepiece = None
    if (path / SENTENCEPIECE).is_file():
        try:
            sentencepiece = tokenizer_from_bytes((path / SENTENCEPIECE).read_bytes())
        except UserError as error:
            if not (path / HF_FILES[0]).is_file():
                raise UserError(error.expected, error.got, error.fix,
                                where=str(path / SENTENCEPIECE)) from None
    # A model that adds a space before a text has further rules, which only tokenizer.json states.
    if (path / HF_FILES[0]).is_file() and (sentencepiece is None or adds_space(sentencepiece)):
        return HuggingFaceTokenizer.from_directory(path)
    return sentencepiece


def adds_space(tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer puts a space before a text and keeps it in decoded texts."""
    return tokenizer.decode(tokenizer.encode("a")) != "a"
