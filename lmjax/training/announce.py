"""What a start tells about its run before the first step: on the terminal and in run.json."""

import os
from typing import Any

import jax

import lmjax
from lmjax.data.objectives import ObjectiveConfig, mark_ids
from lmjax.data.tokenizers import Tokenizer
from lmjax.errors import masked
from lmjax.models.config import TransformerConfig
from lmjax.models.flops import embedding_parameters, flops_per_row
from lmjax.monitoring.units import human_count
from lmjax.runtime.chips import FLAGS
from lmjax.tasks.task import Task
from lmjax.training.run import Log, Run
from lmjax.tree import num_elements


def announce(run: Run, directory: str, log: Log) -> dict[str, Any]:
    """Logs devices, mesh, kernel, model and data of the run, and why each was chosen.

    Returns:
      The same as facts for run.json.
    """
    recipe, model, mesh = run.recipe, run.model, run.layout.mesh
    train, heldout = run.train_split, run.heldout
    devices = mesh.devices.flatten()
    parameters, embedding = num_elements(model.shapes), embedding_parameters(model)
    used = {axis: size for axis, size in mesh.shape.items() if size > 1} or {"data": 1}
    log(f"device: {devices.size} x {devices[0].device_kind} ({devices[0].platform}), "
        f"{jax.process_count()} process(es)")
    log(f"mesh: {', '.join(f'{axis}={size}' for axis, size in used.items())}; computing in "
        f"{model.dtype} ({dtype_reason(run)})")
    if (stages := run.layout.ways("layers")) > 1:
        parts = recipe.train.microbatches
        log(f"pipeline: {stages} stages and {parts} microbatches, so that each stage idles for "
            f"{(stages - 1) / (parts + stages - 1):.0%} of its time; more train.microbatches make "
            "it less")
    log(f"attention: {model.kernel.name} ({model.kernel_reason})")
    log(f"model: {human_count(parameters)} parameters, {human_count(embedding)} of them in "
        f"embeddings; vocabulary {model.config.vocab_size:,}")
    if line := told_heads_of(model.config):
        log(line)
    if run.spec.frozen is not None:
        log(f"trained: {human_count(num_elements(run.spec.shapes.params))} parameters; the other "
            f"{human_count(num_elements(run.spec.shapes.frozen))} are frozen")
    bytes_per_token = f", {train.bytes / train.predictions:.2f} bytes per token" * (train.bytes > 0)
    log(f"data: {human_count(train.predictions)} tokens to train on, "
        f"{human_count(heldout.predictions)} held out{bytes_per_token} ({directory})")
    if run.tokenizer and (line := told_ids_of(recipe.data.objective, run.tokenizer)):
        log(line)
    flags = {name: masked(os.environ[name]) for name in FLAGS if os.environ.get(name)}
    for name, value in flags.items():
        log(f"{name}: {value}")
    return {
        "lmjax": lmjax.__version__,
        "versions": lmjax.versions(),
        "flags": flags,
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind,
                   "count": int(devices.size)},
        "mesh": dict(mesh.shape),
        "attention": {"kernel": model.kernel.name, "reason": model.kernel_reason},
        "parameters": parameters,
        "embedding_parameters": embedding,
        "tokens_per_step": recipe.train.batch_size * recipe.data.seq_len,
        "flops_per_token": flops_per_row(
            model, train.fields, run.spec.is_frozen) / recipe.data.seq_len,
        "compute_dtype": str(model.dtype),
        "steps": recipe.train.steps,
        "data": {"fingerprint": train.fingerprint, "directory": directory},
    }


def told_heads_of(config: TransformerConfig) -> str:
    """Says that the heads are taken to be as large as the base's; "" if that is known or unused."""
    if (config.parametrization == "standard" or config.base_head_dim
            or config.embed_dim == config.base_embed_dim):
        return ""
    return (f"parametrization: {config.parametrization} takes the heads of the base to have "
            f"{config.dims.head_dim} dimensions as well; if not, set model.base_head_dim")


def told_ids_of(config: ObjectiveConfig, tokenizer: Tokenizer) -> str:
    """Says which ids are the objective's mask, sentinels and modes; "" if it has none."""
    own, new = mark_ids(config, tokenizer.vocab_size, tokenizer)
    parts = []
    for ids, whose in ((own, "of the tokenizer's own"), (new, "new after the tokenizer's")):
        if ids:
            shown = "<extra_id_0>" if "<extra_id_0>" in ids else next(iter(ids))
            parts.append(f"{len(ids)} {whose} ({shown} is {ids[shown]})")
    return f"ids of {config.name}: {', '.join(parts)}" if parts else ""


def announce_epochs(run: Run, log: Log) -> dict[str, Any]:
    """Logs which rows the run will train on.

    Returns:
      The largest number of epochs of any source, as a fact for run.json.

    Raises:
      UserError: the run goes through a source more often than data.max_epochs allows.
    """
    recipe, split = run.recipe, run.train_split
    samples = recipe.task.samples if isinstance(recipe.task, Task) else 1
    # Rows that were left out do not count: they would refuse a run that was fine when it began.
    split.check_epochs(run.steps.trained(recipe.train.steps) // samples, recipe.data.max_epochs)
    rows = run.steps.rows(recipe.train.steps) // samples
    epochs = max(split.epochs(rows).values())
    log(f"run: {recipe.train.steps:,} steps of "
        f"{human_count(recipe.train.batch_size * recipe.data.seq_len)} tokens, {epochs:.2f} epochs")
    for line in split.plan(rows) if len(split.sources) > 1 else ():
        log(f"plan: {line}")
    return {"epochs": epochs}


def dtype_reason(run: Run) -> str:
    """Says why the run computes in its dtype."""
    platform = run.layout.mesh.devices.flat[0].platform
    return f"auto: on {platform}" if run.recipe.train.compute_dtype == "auto" else "asked for"
