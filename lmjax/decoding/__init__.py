"""Text out of a model: sampling, beam search, speculative decoding, attention maps."""
