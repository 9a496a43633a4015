"""Hugging Face directories in and out: names, layouts and settings are tables, and no code of theirs is run."""

from lmjax.interop.directory import is_hf_directory, read_directory, read_params, write_directory

__all__ = ["is_hf_directory", "read_directory", "read_params", "write_directory"]
