"""Hugging Face directories in and out: names, layouts and settings are tables, and no code of theirs is run."""

from lmjax.huggingface.directory import (
    is_hf_directory,
    read_directory,
    read_params,
    write_directory,
)
from lmjax.huggingface.settings import difference
from lmjax.huggingface.tokenizers import SENTENCEPIECE, read_tokenizer

__all__ = ["SENTENCEPIECE", "difference", "is_hf_directory", "read_directory", "read_params", "read_tokenizer",
           "write_directory"]
