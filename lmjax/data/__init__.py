"""Data: from stored tokens to batches, in an order that is a pure function."""

from lmjax.data.batches import eval_batches, make_batches
from lmjax.data.config import DataConfig
from lmjax.data.pipeline import open_splits
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import Tokenizer, TokenizerConfig

__all__ = ["DataConfig", "SourceConfig", "Tokenizer", "TokenizerConfig", "eval_batches",
           "make_batches", "open_splits"]
