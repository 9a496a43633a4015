"""Reads and writes Hugging Face directories by tables of names. Never runs code from one."""

from lmjax.huggingface.directory import (
    ExportOptions,
    HFModel,
    is_hf_directory,
    read_directory,
    read_params,
    remarks,
    write_directory,
)
from lmjax.huggingface.heads import TaskHead
from lmjax.huggingface.peft import (
    is_peft_directory,
    on_base,
    read_peft,
    read_peft_params,
    write_peft,
)
from lmjax.huggingface.places import Place, identify, in_cache, kind_of, locate
from lmjax.huggingface.settings import difference
from lmjax.huggingface.tokenizers import SENTENCEPIECE, UNREAD, read_tokenizer, why_unread

__all__ = [
    "SENTENCEPIECE", "UNREAD", "ExportOptions", "HFModel", "Place", "TaskHead", "difference",
    "identify", "in_cache", "is_hf_directory", "is_peft_directory", "kind_of", "locate", "on_base",
    "read_directory", "read_params", "read_peft", "read_peft_params", "read_tokenizer", "remarks",
    "why_unread", "write_directory", "write_peft"]
