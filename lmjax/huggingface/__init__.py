"""Reads and writes Hugging Face directories by tables of names. Never runs code from one."""

from lmjax.huggingface.directory import (
    ExportOptions,
    HFModel,
    is_hf_directory,
    read_directory,
    read_params,
    write_directory,
)
from lmjax.huggingface.places import Place, identify, in_cache, kind_of, locate
from lmjax.huggingface.settings import decided, difference, passed_over
from lmjax.huggingface.tokenizers import SENTENCEPIECE, UNREAD, read_tokenizer, why_unread

__all__ = [
    "SENTENCEPIECE", "UNREAD", "ExportOptions", "HFModel", "Place", "decided", "difference",
    "identify", "in_cache", "is_hf_directory", "kind_of", "locate", "passed_over",
    "read_directory", "read_params", "read_tokenizer", "why_unread", "write_directory"]
