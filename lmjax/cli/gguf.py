"""`lmjax export-gguf` and `lmjax import-gguf`: models for llama.cpp, and models from its files."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from lmjax.cli.arguments import AnyPath, LocalPath
from lmjax.runtime.files import check_new


def add_export_gguf(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax export-gguf`."""
    add = parser.add_argument
    add("checkpoint", type=AnyPath, metavar="CHECKPOINT",
        help="a run's directory, one of its checkpoints, or a Hugging Face directory")
    add("--out", required=True, type=LocalPath, metavar="FILE", help="where the file goes")
    add("--kind", default="", choices=("", "f32", "f16", "q8_0", "q4_0"),
        help="of the matrices (default: q8_0 or q4_0 for packed weights, which stay as they are, "
        "and else f16)")


def export_gguf(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Writes a GGUF file from a checkpoint."""
    check_new(Path(arguments.out))
    from lmjax.compression import gguf
    from lmjax.huggingface.gguf_names import library
    from lmjax.lm import load

    library()  # refuses before the model is loaded
    gguf.export_gguf(load(arguments.checkpoint), Path(arguments.out), kind=arguments.kind)


def add_import_gguf(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax import-gguf`."""
    parser.add_argument("file", type=LocalPath, metavar="FILE", help="a GGUF file")
    parser.add_argument("--out", required=True, type=LocalPath, metavar="DIR",
                        help="where the checkpoint goes")


def import_gguf(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Writes a checkpoint from a GGUF file."""
    check_new(Path(arguments.out))
    from lmjax.compression import gguf

    gguf.import_gguf(Path(arguments.file)).save(arguments.out)
