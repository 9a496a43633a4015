"""A model card: README.md with the metadata that the Hugging Face hub reads, from facts of a run.

Every figure is one of the run's files. What no file says (the license, what the model is good for)
is left to the user, and a README.md that lmjax did not write is never replaced.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmjax.monitoring.units import human_count
from lmjax.reporting.run_files import Columns, RunRecord, read_run
from lmjax.reporting.summary import device_name, source_names
from lmjax.reporting.task_report import title

FILE = "README.md"
MARK = "# Written by lmjax from the files of the run; it is written anew while this line is here."
LICENSE = "# The license is yours to choose: add a line such as `license: apache-2.0`."
# What the hub calls what a model does: by its task, or else by its family.
PIPELINES = {
    "classification": "text-classification", "tagging": "token-classification",
    "questions": "question-answering", "embeddings": "sentence-similarity",
    "decoder": "text-generation", "encoder": "fill-mask", "encdec": "text2text-generation"}
# Figures of an evaluation that say how it was made, and not how good the model is.
NO_METRICS = ("step", "tokens", "examples", "best_step", "of_decoded_text")


def write_card(folder: Path, run: RunRecord, *, step: int | None = None,
               usage: str = "") -> Path | None:
    """Writes FOLDER/README.md, unless there is one that lmjax did not write.

    Args:
      folder: where the model is, or the run.
      run: the run that trained it.
      step: of the model's weights; None: the newest.
      usage: Python that loads an exported model; "" stands for loading the run.

    Returns:
      The file, or None if it was left as it is.
    """
    file = folder / FILE
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    text = card(run, run.step if step is None else step, usage)
    temporary = file.with_name(f"{FILE}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
    return file


def write_export_card(out: Path, source: str, step: int) -> Path | None:
    """Writes a model card beside an exported model, if the run that trained it is at hand.

    Args:
      out: the Hugging Face directory.
      source: the run, or one of its checkpoints.
      step: of the weights.

    Returns:
      The file, or None if there is no run.
    """
    path = Path(source)
    runs = [folder for folder in (path, path.parent, path.parent.parent)
            if (folder / "metrics.jsonl").exists() and (folder / "config.json").exists()]
    if not source or not runs:
        return None
    usage = f'import lmjax\n\nlm = lmjax.load("{out.name}")'
    config = out / "config.json"
    kinds = json.loads(config.read_text()).get("architectures", []) if config.exists() else []
    if kinds:
        usage += (f'\n\nfrom transformers import AutoTokenizer, {kinds[0]}\n\n'
                  f'model = {kinds[0]}.from_pretrained("{out.name}")\n'
                  f'tokenizer = AutoTokenizer.from_pretrained("{out.name}")')
    return write_card(out, read_run(runs[0]), step=step, usage=usage)


def card(run: RunRecord, step: int, usage: str = "") -> str:
    """The text of the model card of a run's weights after `step` steps."""
    name = run.workdir.resolve().name
    results = list(_results(run, step))
    metadata = {"library_name": "transformers" if usage else "lmjax",
                **_metadata(run, name, results)}
    front = "\n".join([MARK, LICENSE, *_yaml(metadata)])
    rows = [(f"{title(metric)}, {part}", f"{value:.4f}") for part, metric, value in results]
    sections = [
        f"# {name}", _table("Model", _model(run)), _table("Training", _training(run, step)),
        _table("Results", rows) if rows else "",
        "## Use\n\n```python\n{}\n```".format(
            usage or f'import lmjax\n\nlm = lmjax.load("{name}", step={step})')]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{front}\n---\n\n{body}\n"


def _metadata(run: RunRecord, name: str,
              results: list[tuple[str, str, float]]) -> dict[str, Any]:
    data, model = run.config.get("data", {}), run.config.get("model", {})
    task, family = run.config.get("task", {}).get("name", ""), model.get("family", "decoder")
    pipeline = PIPELINES.get(task, PIPELINES[family])
    sources = [str(source["name"]) for source in data.get("sources", []) if source.get("name")]
    found: dict[str, Any] = {
        "pipeline_tag": pipeline,
        "tags": ["lmjax", "jax", *([task] if task else [])],
        "language": list((data.get("curate") or {}).get("languages") or ()), "datasets": sources,
        "base_model": _base(run.config)}
    by_part: dict[str, list[dict[str, Any]]] = {}
    for part, metric, value in results:
        by_part.setdefault(part, []).append(
            {"type": metric, "name": title(metric), "value": value})
    found["model-index"] = [{"name": name, "results": [
        {"task": {"type": pipeline}, "dataset": {"type": part, "name": f"{part} part of the data"},
         "metrics": metrics} for part, metrics in by_part.items()]}] if by_part else []
    return {key: value for key, value in found.items() if value}


def _base(config: Mapping[str, Any]) -> str:
    """The name of the model that the run started from: that of its directory, or its hub's."""
    path = config.get("train", {}).get("init_from", "").rstrip("/")
    parts = [part for part in path.split("/") if part.startswith("models--")]
    return parts[-1].removeprefix("models--").replace("--", "/") if parts else Path(path).name


def _results(run: RunRecord, step: int) -> Iterator[tuple[str, str, float]]:
    """(part of the data, metric, value) of the last evaluation of the weights after `step` steps.

    The weights are the averaged ones, if the run kept an average: those are loaded.
    """
    for part, group in (("held-out", "eval"), ("test", "test")):
        columns: Columns = run.evals.get(f"{group}_ema") or run.evals.get(group) or {}
        # A test is of the weights of the best step, where that is kept.
        of = columns.get("best_step") if group == "test" else None
        for name, values in columns.items():
            found = values[(columns["step"] if of is None else of) == step]
            if name not in NO_METRICS and len(found) and math.isfinite(found[-1]):
                yield part, name, float(found[-1])


def _model(run: RunRecord) -> list[tuple[str, str]]:
    model, facts = run.config.get("model", {}), run.facts
    names = ("family", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "vocab_size")
    rows = [(name.replace("_", " "), str(model[name])) for name in names if model.get(name)]
    if "parameters" in facts:
        rows.insert(1, ("parameters", f"{facts['parameters']:,}"))
    return [*rows, ("tokens per row", str(run.config.get("data", {}).get("seq_len", "")))]


def _training(run: RunRecord, step: int) -> list[tuple[str, str]]:
    config, train = run.config, run.config.get("train", {})
    optimizer, rows = config.get("optimizer", {}), [("steps", f"{step:,}")]
    if run.train or run.facts:
        rows.append((f"{run.unit}s seen", human_count(float(run.tokens(step)))))
    names = source_names(run)
    rows += [("data", ", ".join(names)), ("rows per step", str(train.get("batch_size", ""))),
             ("optimizer", f"{optimizer.get('name', '')}, peak learning rate "
              f"{optimizer.get('peak_lr', math.nan):g}, {optimizer.get('schedule', '')}"),
             ("started from", _base(config) or "random weights"),
             ("seed", str(train.get("seed", ""))), ("device", device_name(run)),
             ("lmjax", str(run.facts.get("lmjax", ""))),
             ("data fingerprint", str(run.facts.get("data", {}).get("fingerprint", ""))[:12])]
    if run.best_step:
        rows.append((f"best step by {config.get('eval', {}).get('metric', '')}",
                     f"{run.best_step:,}"))
    return [row for row in rows if row[1]]


def _table(heading: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows]
    return "\n".join([f"## {heading}", "", "| | |", "| --- | --- |", *lines])


def _yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Lists and mappings as lines of YAML; every scalar is written as JSON, which YAML reads."""
    items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for key, inner in items:
        head = f"{indent}- " if key is None else f"{indent}{key}: "
        if not isinstance(inner, (dict, list)):
            yield head + json.dumps(inner, ensure_ascii=False)
        elif key is not None:
            yield head.rstrip()
            yield from _yaml(inner, f"{indent}  ")
        else:
            lines = list(_yaml(inner, f"{indent}  "))
            yield head + lines[0].removeprefix(f"{indent}  ")
            yield from lines[1:]
