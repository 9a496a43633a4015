"""The doctor's look at Hugging Face directories."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax import huggingface
from lmjax.cli.doctor.diagnosis import NOTE, Diagnosis
from lmjax.cli.doctor.runs import describe_model, model_uses, not_finite
from lmjax.data.tokenizers import Tokenizer
from lmjax.errors import UserError
from lmjax.huggingface.tensors import Entry
from lmjax.lm import load
from lmjax.monitoring.units import human_bytes
from lmjax.training.pretrained import find
from lmjax.tree import num_elements

# Each shows something that a tokenizer may lose: capitals, spaces, lines, accents, rare letters.
PROBES = ("The Quick Brown Fox", " two  spaces ", "a\nb\n", "naïve café", "日本語", "\t1,234.5")


def is_model(path: str) -> bool:
    """Whether `path` is the directory of a Hugging Face model."""
    return "://" not in path and huggingface.is_hf_directory(Path(path))


def examine_model(path: str, whole: bool) -> Diagnosis:
    """Examines a Hugging Face directory."""
    found = Diagnosis(path, "a Hugging Face model directory")
    models: list[huggingface.HFModel] = []

    def files() -> str:
        models.append(huggingface.read_directory(Path(path)))
        return _weights(models[0].entries)

    if not found.check("files", files):
        return found
    model = models[0]
    settings = model.source["settings"]
    found.kind += f" of model_type {settings['model_type']}"
    if found.check("weights", lambda: _load(path) if whole else "not read (--quick)"):
        found.uses += model_uses(path, find(path).recipe)
    if model.tokenizer is None:
        found.add(NOTE, "tokenizer", "none; lmjax.load(path).logits(ids) works on ids")
    else:
        _describe_tokenizer(found, model.tokenizer)
    _note_ids(found, model.source)
    return found


def _weights(entries: Mapping[str, Entry]) -> str:
    files = {entry.file for entry in entries.values()}
    size = sum(file.stat().st_size for file in files)
    dtypes = sorted({entry.dtype for entry in entries.values()})
    return (f"{len(entries):,} tensors ({', '.join(dtypes)}) in {len(files)} file(s), "
            f"{human_bytes(size)}")


def _load(path: str) -> str:
    """Loads the model as every command would, and looks for values that are not finite."""
    lm = load(path)
    bad = not_finite(lm.params)
    if bad:
        raise UserError("finite weights", f"NaN or infinity in {bad[0]}"
                        + f" and {len(bad) - 1} more" * (len(bad) > 1),
                        "fetch them again, or take an earlier checkpoint", where=path)
    return describe_model(lm.recipe, num_elements(lm.params))


def _describe_tokenizer(found: Diagnosis, tokenizer: Tokenizer) -> None:
    found.check("tokenizer", lambda: f"{tokenizer.vocab_size:,} tokens")
    lost = [text for text in PROBES if tokenizer.decode(tokenizer.encode(text)) != text]
    if lost:
        got = tokenizer.decode(tokenizer.encode(lost[0]))
        found.add(NOTE, "tokenizer", f"loses part of some texts: {lost[0]!r} becomes {got!r}")


def _note_ids(found: Diagnosis, source: Mapping[str, Any]) -> None:
    """Says which ids end an answer, where there are several."""
    ends = source["generation"].get("eos_token_id", source["settings"].get("eos_token_id"))
    if isinstance(ends, list) and len(ends) > 1:
        found.add(NOTE, "end of text", f"any of the ids {', '.join(map(str, ends))}")
