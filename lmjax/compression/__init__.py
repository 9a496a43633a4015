"""Smaller models from a model."""
