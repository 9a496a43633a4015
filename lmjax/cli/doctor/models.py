"""The doctor's look at Hugging Face directories."""

import contextlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

from lmjax import huggingface
from lmjax.cli.doctor.diagnosis import BAD, GOOD, NOTE, Diagnosis
from lmjax.cli.doctor.reading import describe_reading
from lmjax.cli.doctor.runs import describe_model, model_uses, not_finite
from lmjax.data.objectives import ObjectiveConfig, mark_ids
from lmjax.data.tokenizers import HF_FILES, SentencePieceTokenizer, Tokenizer
from lmjax.errors import UserError
from lmjax.huggingface.stored import BUFFERS
from lmjax.huggingface.tensors import INDEX, SINGLE, WEIGHTS, Entry
from lmjax.lm import load
from lmjax.models.model import ModelConfig
from lmjax.monitoring.units import human_bytes
from lmjax.training.announce import told_ids_of
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
        found.check("weights", lambda: _load(place.path) if whole else "not read (--quick)")
        _add_reading(found, place.path)
        return found
    if place.model is None:
        found.add(BAD, "files", str(place.fault))
        return found
    model = place.model
    found.kind += f" of model_type {model.source['settings']['model_type']}"
    found.add(GOOD, "files", _weights(model.entries))
    _note_files(found, model)
    found.check("weights", lambda: _load(place.path) if whole else "not read (--quick)")
    if model.tokenizer is None:
        found.add(NOTE, "tokenizer", "none that lmjax reads; lmjax.load(path).logits(ids) works")
    else:
        _describe_tokenizer(found, model.tokenizer)
        _note_training(found, model.config, model.tokenizer)
    _add_reading(found, place.path)
    return found


def _add_reading(found: Diagnosis, where: Path) -> None:
    recipe = describe_reading(found, str(where))
    if recipe is not None:  # a diagnosis with a fault does not show its uses
        found.uses += model_uses(found.path, recipe)


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


def _note_files(found: Diagnosis, model: huggingface.HFModel) -> None:
    """Says which of several files and settings decides, and what is read under another name."""
    for file, line in huggingface.remarks(model):
        found.add(NOTE, "config" if file == "config.json" else "weights", line)
    renamed = [(entry.name, name) for name, entry in model.entries.items() if entry.name != name]
    if renamed:
        found.add(NOTE, "weights", f"{len(renamed)} are read under other names, such as "
                  f"{renamed[0][0]} as {renamed[0][1]}")
    buffers = [name for name in model.entries if any(re.fullmatch(b, name) for b in BUFFERS)]
    if buffers:
        found.add(NOTE, "weights", f"{len(buffers)} are buffers, which are made anew: {buffers[0]}")
    read = {entry.file.name for entry in model.entries.values()} | {SINGLE, INDEX}
    others = sorted(file.name for file in model.path.iterdir()
                    if file.suffix in WEIGHTS and file.name not in read)
    if others:
        found.add(NOTE, "files", f"weights that are not read: {', '.join(others)}")


def _load(path: Path) -> str:
    """Loads the model as every command would, and looks for values that are not finite."""
    with contextlib.redirect_stderr(io.StringIO()):  # what it tells is among the findings
        lm = load(path)
    bad = not_finite(lm.params)
    if bad:
        raise UserError("finite weights", f"NaN or infinity in {bad[0]}"
                        + f" and {len(bad) - 1} more" * (len(bad) > 1),
                        "fetch them again, or take an earlier checkpoint", where=str(path))
    return describe_model(lm.recipe, num_elements(lm.params))


def _describe_tokenizer(found: Diagnosis, tokenizer: Tokenizer) -> None:
    found.add(GOOD, "tokenizer", f"{tokenizer.vocab_size:,} tokens{_files_of(tokenizer)}")
    lost = [text for text in PROBES if tokenizer.decode(tokenizer.encode(text)) != text]
    if lost:
        got = tokenizer.decode(tokenizer.encode(lost[0]))
        found.add(NOTE, "tokenizer", f"loses part of some texts: {lost[0]!r} becomes {got!r}")


def _files_of(tokenizer: Tokenizer) -> str:
    """Which file decides, and which others belong to the tokenizer."""
    decides = HF_FILES[0]
    if isinstance(tokenizer, SentencePieceTokenizer):
        decides = huggingface.SENTENCEPIECE
    told, rest = f" of {decides}", sorted(tokenizer.files.keys() - {decides})
    if decides == HF_FILES[0]:
        if huggingface.SENTENCEPIECE in rest:
            rest.remove(huggingface.SENTENCEPIECE)
            told += f"; {huggingface.SENTENCEPIECE} beside it is not read"
        made = json.loads(tokenizer.to_bytes())
        if added := made.get("added"):
            told += f"; {len(added)} are added or changed by other files"
        if rows := made.get("rows"):
            told += f"; ids from {rows:,} on have no row in the model and do not exist"
    return told + f"; kept with it: {', '.join(rest)}" * bool(rest)


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
