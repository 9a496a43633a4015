"""Tokenizers: text to token ids and back."""

from lmjax.data.tokenizers.base import SPACE, NamedIds, Tokenizer, word_tables
from lmjax.data.tokenizers.factory import (
    TokenizerFactory,
    check_vocab_size,
    prepared_tokenizer,
    sentencepiece_tokenizer,
    tokenizer_from_bytes,
)
from lmjax.data.tokenizers.files import HF_FILES, name_of, named_tokens, tokenizer_settings
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.data.tokenizers.sentencepiece import (
    SentencePieceTokenizer,
    TokenizerConfig,
    train_tokenizer,
)

__all__ = ["HF_FILES", "SPACE", "HuggingFaceTokenizer", "NamedIds", "SentencePieceTokenizer",
           "Tokenizer", "TokenizerConfig", "TokenizerFactory", "check_vocab_size", "name_of",
           "named_tokens", "prepared_tokenizer", "sentencepiece_tokenizer", "tokenizer_from_bytes",
           "tokenizer_settings", "train_tokenizer", "word_tables"]
