"""Models: one file per architecture; `model.py` turns a config into pure functions of a parameter tree."""

from lmjax.models.model import FAMILIES, Batch, Hidden, Model, ModelConfig, build_model

__all__ = ["FAMILIES", "Batch", "Hidden", "Model", "ModelConfig", "build_model"]
