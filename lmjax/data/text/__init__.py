"""Text: where it is read from, and what is measured and changed in it."""
