"""Adapters in the format of Hugging Face's PEFT: adapter_config.json and its safetensors.

PEFT names an adapter's matrices after the module that it adapts, so the tables of weights tell
where each of ours lies. Only LoRA and its variants on the layers' matrices are read.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.errors import UserError
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.schema import ModelType
from lmjax.huggingface.settings import write_settings
from lmjax.huggingface.stored import plain_names, rows_for
from lmjax.huggingface.tensors import (
    SINGLE,
    Entry,
    headers,
    read_json,
    write_json,
    write_tensors,
)
from lmjax.huggingface.weights import (
    Stored,
    Table,
    check_tensors,
    read_tree,
    tensor_getter,
    tensor_shapes,
)
from lmjax.models.model import Model, ModelConfig
from lmjax.nn.adapters import NAME, AdapterConfig, is_adapter
from lmjax.nn.module import Params
from lmjax.runtime.files import new_directory
from lmjax.tree import split_tree

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WRAPPED = "base_model.model."  # PEFT puts it before the names of its base's modules
# Our parameter of an adapter -> what their tensor's name has after that of the module.
TENSORS = {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
# Settings that we read, and settings that change nothing about what a trained adapter computes.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias",
        "init_lora_weights", "base_model_name_or_path"}
NEUTRAL = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
           "target_modules", "exclude_modules", "fan_in_fan_out", "megatron_core",
           "megatron_config", "layers_pattern", "qalora_group_size", "ensure_weight_tying"}
# Initial values that leave the base as it is; others change its weights.
INITIAL = (True, False, None, "gaussian", "orthogonal")
MERGE = "merge it with peft's merge_and_unload, and load what that gives"
TASKS = {"decoder": "CAUSAL_LM", "encoder": None, "encdec": "SEQ_2_SEQ_LM"}


class PeftAdapter(NamedTuple):
    """A PEFT directory whose settings have been checked; its weights are not read yet."""

    path: Path
    base: str  # the name or the directory of the model that it is for
    config: AdapterConfig  # its `targets` are not known before the base is
    entries: Mapping[str, Entry]  # the stored tensors, without PEFT's prefix


def is_peft_directory(path: Path) -> bool:
    """Whether `path` holds an adapter."""
    return (path / SETTINGS).is_file()


def read_peft(path: Path) -> PeftAdapter:
    """Reads the settings of a PEFT directory, and the names and shapes of its tensors.

    Raises:
      UserError: it is no LoRA, or has something that lmjax does not compute.
    """
    settings, where = read_json(path / SETTINGS), f"{path}/{SETTINGS}"

    def must(name: str, wanted: tuple[Any, ...]) -> None:
        if settings.get(name) not in wanted:
            raise UserError(f"{name} to be {wanted[0]!r}, as lmjax computes no other adapters",
                            repr(settings.get(name)), MERGE, where)

    must("peft_type", ("LORA",))
    must("bias", ("none", None))
    must("init_lora_weights", INITIAL)
    for name in sorted(settings.keys() - READ - NEUTRAL):
        if settings[name]:  # a setting that is empty is off
            must(name, (None, False))
    rank, alpha = int(settings.get("r", 8)), float(settings.get("lora_alpha", 8))
    kind = "rslora" if settings.get("use_rslora") else "lora"
    if settings.get("use_dora"):
        # DoRA with the scale of rsLoRA is DoRA with a larger alpha.
        alpha, kind = alpha * (rank**0.5 if kind == "rslora" else 1.0), "dora"
    base = settings.get("base_model_name_or_path") or ""
    config = AdapterConfig(kind=kind, rank=rank, alpha=alpha,
                           dropout=float(settings.get("lora_dropout", 0.0)))
    entries = {name.removeprefix(WRAPPED).replace("vector.weight", "vector"): entry
               for name, entry in headers([path / WEIGHTS]).items()}
    return PeftAdapter(path, base, config, entries)


def on_base(found: PeftAdapter, base: ModelConfig, source: Mapping[str, Any] | None
            ) -> tuple[PeftAdapter, Table]:
    """Finds the matrices of the base that an adapter is for.

    Args:
      found: from `read_peft`.
      base: the config of the model that it is for.
      source: what that model's checkpoint says of its import, if it was imported.

    Returns:
      `found` with its targets and with the names of the table, and where its tensors lie.

    Raises:
      UserError: it adapts no matrix of a layer, or a matrix that the base has in another form.
    """
    model_type = _model_type(base, source)
    entries = plain_names(found.entries, model_type, str(found.path))
    targets, held = [], set()
    for path, row in _matrices(model_type, base).items():
        names = [row.theirs.removesuffix(".weight") + tensor for tensor in TENSORS.values()]
        mine = [name for name in entries if any(_same(name, wanted) for wanted in names)]
        if mine and row.part[1] > 1:
            raise _fused(path, row, str(found.path))
        if mine:
            targets.append(path.removesuffix("/kernel"))
            held |= set(mine)
    if others := sorted(entries.keys() - held):
        raise UserError("adapters of the layers' matrices alone", others[0], MERGE,
                        str(found.path))
    if not targets:
        raise UserError("at least one adapter", "none", "fetch it again", str(found.path))
    config = AdapterConfig(found.config.kind, found.config.rank, found.config.alpha,
                           f"^({'|'.join(sorted(targets))})$", found.config.dropout)
    table = adapter_table(model_type, base)
    return found._replace(config=config, entries=entries), table


def read_peft_params(found: PeftAdapter, table: Table, shapes: Params, shardings: Params) -> Params:
    """Reads the adapters' parameters, float32, onto the devices that `shardings` names.

    Raises:
      UserError: a tensor is missing, not needed or of another shape.
    """
    check_tensors(found.entries, shapes, table, where=str(found.path))
    return read_tree(found.entries, shapes, shardings, table)


def write_peft(out: Path, model: Model, params: Params, *, base: str,
               source: Mapping[str, Any] | None = None) -> None:
    """Writes a model's adapters as a PEFT directory.

    Args:
      out: the directory, which must not exist yet.
      model: the model, with adapters.
      params: its parameters.
      base: the name or the directory under which transformers finds the base.
      source: what the model's checkpoint says of its import, if it was imported.

    Raises:
      UserError: `out` exists, the model has no adapters, or no Hugging Face model type has the
        matrices that they are for.
    """
    config, adapter = model.config, model.adapter
    if not adapter.kind:
        raise UserError("a model with adapters", "one without", "leave out its base", "export")
    model_type = _model_type(config, source)
    params, _ = split_tree(params, is_adapter)
    table = adapter_table(model_type, config)
    shapes = tensor_shapes(params, table)
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in shapes})
    settings = {
        "peft_type": "LORA", "task_type": TASKS[config.family], "base_model_name_or_path": base,
        "r": adapter.rank, "lora_alpha": _whole(adapter.alpha), "lora_dropout": adapter.dropout,
        "target_modules": _short(modules, model_type, config), "bias": "none",
        "use_rslora": adapter.kind == "rslora", "use_dora": adapter.kind == "dora",
        "fan_in_fan_out": model_type.name == "gpt2", "inference_mode": True}
    get = tensor_getter(params, table)
    with new_directory(out) as part:
        write_json(part / SETTINGS, settings)
        write_tensors(part, {WRAPPED + name: shape for name, shape in shapes.items()},
                      lambda name: get(name.removeprefix(WRAPPED)), dtype="float32",
                      max_shard_bytes=sum(map(math.prod, shapes.values())) * 4)
        (part / SINGLE).rename(part / WEIGHTS)


def adapter_table(model_type: ModelType, config: ModelConfig) -> Table:
    """Where each parameter of each adapter lies in PEFT's tensors, without their prefix."""
    table = {}
    for path, row in _matrices(model_type, config).items():
        module, ours = row.theirs.removesuffix(".weight"), path.removesuffix("kernel") + NAME
        if row.part[1] > 1:
            continue
        into = "out,in2" if "in2" in row.how else "out,in"
        for name, how in (("a", into), ("b", "out,in"), ("magnitude", "flat")):
            order = () if name == "a" else row.order
            table[f"{ours}/{name}"] = Stored(module + TENSORS[name], how, order=order)
    return table


def _matrices(model_type: ModelType, config: ModelConfig) -> dict[str, Stored]:
    """The matrices of the layers that may have adapters, by their paths."""
    if config.first_dense:  # PEFT's names do not tell the two stacks apart
        raise UserError("a base whose layers are all alike, for adapters in PEFT's form",
                        f"one with moe.first_dense={config.first_dense}", MERGE, "adapters")
    return {path: row for path, row in rows_for(model_type, config).items()
            if "layers/block/" in path and path.endswith("/kernel") and row.theirs.count("{}") == 1}


def _model_type(config: ModelConfig, source: Mapping[str, Any] | None) -> ModelType:
    name = (source or {"settings": {}})["settings"].get("model_type", "")
    return MODEL_TYPES[name or write_settings(config)["model_type"]]


def _same(name: str, wanted: str) -> bool:
    """Whether `name` is `wanted` with a number in place of its {}."""
    before, after = wanted.split("{}")
    number = name.removeprefix(before).removesuffix(after)
    return number.isdigit() and name == before + number + after


def _short(modules: list[str], model_type: ModelType, config: ModelConfig) -> list[str]:
    """The last parts of the modules' names, if these name no other module; else the whole names."""
    last = {name.rsplit(".", 1)[1] for name in modules}
    adapted = {tuple(name.split(".")[-2:]) for name in modules}
    every = {tuple(row.theirs.removesuffix(".weight").split(".")[-2:])
             for path, row in rows_for(model_type, config).items() if path.endswith("/kernel")}
    if {pair for pair in every if pair[1] in last} == adapted:
        return sorted(last)
    return modules


def _fused(path: str, row: Stored, where: str) -> UserError:
    return UserError("matrices that the base has one by one", f"{row.theirs.format(0)}, of which "
                     f"{path.removesuffix('/kernel')} is a share", MERGE, where)


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha
