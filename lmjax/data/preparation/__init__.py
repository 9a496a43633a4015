"""Corpus preparation: cleaning, deduplication, decontamination, tokenisation, storage."""
