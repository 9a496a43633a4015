"""GGUF files from models, and models from GGUF files."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from lmjax.compression.integer_steps import integer_steps
from lmjax.data.chat import FILE
from lmjax.errors import UserError
from lmjax.huggingface.gguf_export import KINDS, GGUFOptions, write_gguf
from lmjax.huggingface.gguf_import import to_directory
from lmjax.lm import LM, load
from lmjax.models.folding import folded
from lmjax.runtime.files import check_new

OF_WEIGHTS = {"": "f16", "int8": "q8_0", "int8_dynamic": "q8_0", "int4": "q4_0"}


def export_gguf(lm: LM, out: Path, *, kind: str = "",
                log: Callable[[str], None] = print) -> None:
    """Writes a decoder as a GGUF file.

    Args:
      lm: the model. If its weights are packed, the file holds the same integers.
      out: the file, which must not exist yet.
      kind: of the matrices, a kind of `gguf_export.KINDS`; "": that of packed weights, else f16.
      log: prints a line for the user.

    Raises:
      UserError: `out` exists, GGUF holds no such model, or packed weights are asked for in another
        kind that is not f32 or f16.
    """
    check_new(out)
    quantization = lm.model.quantization
    own = OF_WEIGHTS[quantization.weights]
    kind = kind or own
    if kind not in KINDS:
        raise UserError(f"one of {', '.join(KINDS)}", repr(kind), "choose one", where="--kind")
    steps = None
    whole = lm
    if quantization.weights:
        if kind not in (own, "f32", "f16"):
            raise UserError(f"{own}, f32 or f16 for {quantization.weights} weights", kind,
                            "choose one of them, or export the model they were made from",
                            where="--kind")
        whole, steps = lm.dense(), integer_steps(lm) if kind == own else None
    elif lm.model.adapter.kind:
        whole = lm.merge()
    tokenizer = lm.need_tokenizer()
    options = GGUFOptions(kind, steps, lm.about.get("huggingface"), lm.recipe.data.seq_len,
                          tokenizer.files.get(FILE, b"").decode())
    model, params = whole.model, whole.params
    if steps is None:  # integers cannot be scaled one by one: `write_settings` refuses them
        model, params = folded(model, params)
    write_gguf(out, model, params, lm.reader, options, log=log)


def import_gguf(file: Path) -> LM:
    """The model of a GGUF file, with its weights unpacked to float32.

    Raises:
      UserError: see `gguf_import.to_directory`.
    """
    with tempfile.TemporaryDirectory() as folder:
        to_directory(file, Path(folder))
        lm = load(folder)
    lm.source = str(file)
    return lm
