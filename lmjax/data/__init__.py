"""Data: from text to stored tokens to batches, in an order that is a pure function."""
