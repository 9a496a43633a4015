"""The doctor's look at Hugging Face directories."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax import huggingface
from lmjax.cli.doctor.diagnosis import BAD, GOOD, NOTE, Diagnosis
from lmjax.cli.doctor.runs import describe_model, model_uses, not_finite
from lmjax.data.objectives import ObjectiveConfig, mark_ids
from lmjax.data.tokenizers import Tokenizer
from lmjax.errors import UserError
from lmjax.huggingface.tensors import Entry
from lmjax.lm import load
from lmjax.models.model import ModelConfig
from lmjax.monitoring.units import human_bytes
from lmjax.training.announce import told_ids_of
from lmjax.training.pretrained import find
from lmjax.training.recipe import DEFAULT_OBJECTIVES
from lmjax.tree import num_elements

# Each shows something that a tokenizer may lose: capitals, spaces, lines, accents, rare letters.
PROBES = ("The Quick Brown Fox", " two  spaces ", "a\nb\n", "naïve café", "日本語", "\t1,234.5")


def is_huggingface(path: str) -> bool:
    """Whether `path` is something of Hugging Face: a model, a cache, a name in it, a file."""
    return "://" not in path and bool(huggingface.kind_of(path))


def examine_huggingface(path: str, whole: bool) -> Diagnosis:
    """Examines something of Hugging Face."""
    place = huggingface.identify(path)
    if place.kind == "tokenizer":
        return _examine_tokenizer(path)
    kinds = {"model": "a Hugging Face model directory",
             "hub cache": f"a model in the hub's cache, {place.path}",
             "weights file": "a file of weights"}
    found = Diagnosis(path, kinds.get(place.kind, f"a {place.kind}"))
    if place.kind == "adapter" and place.fault is None:
        found.kind = "an adapter in the format of PEFT"
        if found.check("weights", lambda: _load(place.path) if whole else "not read (--quick)"):
            found.uses += model_uses(path, find(place.path).recipe)
        return found
    if place.model is None:
        found.add(BAD, "files", str(place.fault))
        return found
    model = place.model
    found.kind += f" of model_type {model.source['settings']['model_type']}"
    found.add(GOOD, "files", _weights(model.entries))
    if found.check("weights", lambda: _load(place.path) if whole else "not read (--quick)"):
        found.uses += model_uses(path, find(place.path).recipe)
    if model.tokenizer is None:
        found.add(NOTE, "tokenizer", "none that lmjax reads; lmjax.load(path).logits(ids) works")
    else:
        _describe_tokenizer(found, model.tokenizer)
        _note_training(found, model.config, model.tokenizer)
    _note_ids(found, model.source)
    return found


def _examine_tokenizer(path: str) -> Diagnosis:
    found = Diagnosis(path, "a directory with a tokenizer and no model")
    tokenizers: list[Tokenizer] = []

    def read() -> str:
        tokenizer = huggingface.read_tokenizer(Path(path))
        if tokenizer is None:
            raise UserError("tokenizer.json or tokenizer.model", "neither", "convert it with "
                            "transformers' save_pretrained", path)
        tokenizers.append(tokenizer)
        return "read"

    if found.check("files", read):
        _describe_tokenizer(found, tokenizers[0])
        found.uses.append("lmjax prepare --config FILE --out DIR "
                          f"--config.data.tokenizer.path={path} "
                          f"--config.data.tokenizer.vocab_size={tokenizers[0].vocab_size}")
    return found


def _weights(entries: Mapping[str, Entry]) -> str:
    files = {entry.file for entry in entries.values()}
    size = sum(file.stat().st_size for file in files)
    dtypes = sorted({entry.dtype for entry in entries.values()})
    return (f"{len(entries):,} tensors ({', '.join(dtypes)}) in {len(files)} file(s), "
            f"{human_bytes(size)}")


def _load(path: Path) -> str:
    """Loads the model as every command would, and looks for values that are not finite."""
    lm = load(path)
    bad = not_finite(lm.params)
    if bad:
        raise UserError("finite weights", f"NaN or infinity in {bad[0]}"
                        + f" and {len(bad) - 1} more" * (len(bad) > 1),
                        "fetch them again, or take an earlier checkpoint", where=str(path))
    return describe_model(lm.recipe, num_elements(lm.params))


def _describe_tokenizer(found: Diagnosis, tokenizer: Tokenizer) -> None:
    found.check("tokenizer", lambda: f"{tokenizer.vocab_size:,} tokens")
    lost = [text for text in PROBES if tokenizer.decode(tokenizer.encode(text)) != text]
    if lost:
        got = tokenizer.decode(tokenizer.encode(lost[0]))
        found.add(NOTE, "tokenizer", f"loses part of some texts: {lost[0]!r} becomes {got!r}")


def _note_training(found: Diagnosis, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Says which ids would hide text if an encoder or an encoder-decoder is trained on."""
    objective = ObjectiveConfig(DEFAULT_OBJECTIVES.get(config.family, "causal_lm"))
    text = told_ids_of(objective, tokenizer)
    _, new = mark_ids(objective, tokenizer.vocab_size, tokenizer)
    free = max(config.vocab_size - tokenizer.vocab_size, 0)
    if free < len(new):
        text += f"; the model has free rows for {free} of these {len(new)}"
    if text:
        found.add(NOTE, "training", text)


def _note_ids(found: Diagnosis, source: Mapping[str, Any]) -> None:
    """Says which ids end an answer, where there are several."""
    ends = source["generation"].get("eos_token_id", source["settings"].get("eos_token_id"))
    if isinstance(ends, list) and len(ends) > 1:
        found.add(NOTE, "end of text", f"any of the ids {', '.join(map(str, ends))}")
