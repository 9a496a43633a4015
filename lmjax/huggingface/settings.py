"""config.json to our model config and back, by the rows of `MODEL_TYPES`.

config.json is read as plain JSON: nothing in it is run.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lmjax.config import build
from lmjax.errors import UserError
from lmjax.huggingface import heads
from lmjax.huggingface.heads import TaskHead
from lmjax.huggingface.layer_types import read_layers, write_layers
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.rope import ORIGINAL, read_rope, told_twice, write_rope
from lmjax.huggingface.schema import (
    NEUTRAL,
    ONLY,
    PASSED_OVER,
    ModelType,
    Setting,
    not_computed,
)
from lmjax.models.config import is_local
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encdec import EncDecConfig
from lmjax.models.encoder import EncoderConfig
from lmjax.models.model import ModelConfig

Settings = Mapping[str, Any]
# Fields of our config that do not change what a trained model computes.
FREE = ("dropout", "init_std", "embedding_std", "attention", "scan_layers", "remat")
# Settings of `NEUTRAL` that tell what a model is, where its class reads them.
WRITTEN_ANEW = {"layer_types", "rope_theta", "rope_scaling", "rope_parameters", "dtype",
                "auto_map"}


def model_type_of(settings: Settings, where: str) -> ModelType:
    """The model type of a config.json, with the head of a task if it speaks of one.

    Raises:
      UserError: the model needs code of its own, its `model_type` is not one of `MODEL_TYPES`, or
        lmjax does not compute its head.
    """
    known = ", ".join(MODEL_TYPES)
    name = settings.get("model_type")
    found = MODEL_TYPES[name] if name in tuple(MODEL_TYPES) else None  # a list has no hash
    code = settings.get("auto_map")
    own = found.own_code if found and isinstance(code, dict) else ()
    if code and not (own and {str(value).split("--")[-1] for value in code.values()} <= {*own}):
        raise UserError("a model that needs no code of its own",
                        f"auto_map={settings['auto_map']!r}",
                        "lmjax never runs a repository's code, use a model type that it knows "
                        f"({known})", where)
    if found is None:
        raise UserError(f"model_type to be one of {known}", repr(name), "convert it to one of them",
                        where)
    head = heads.read_head(settings, found, where)
    return found if head is None else heads.with_head(found, head)


def read_settings(settings: Settings, where: str,
                  present: Mapping[str, Any] | None = None) -> ModelConfig:
    """Converts a config.json to our model config.

    Args:
      settings: the content of config.json.
      where: the file, for error messages.
      present: fields of ours that follow from which tensors are stored.

    Raises:
      UserError: a setting is missing or unknown, or lmjax would compute something else with it.
    """
    model_type = model_type_of(settings, where)
    try:
        fields = _fields(model_type, settings, where, present or {})
        return _build(model_type, fields, where)
    except (TypeError, AttributeError, ZeroDivisionError, IndexError) as error:  # a list, say
        raise UserError("settings as transformers writes them", f"one of another kind ({error})",
                        "fetch it again", where) from None


def passed_over(settings: Settings) -> list[str]:
    """The settings of a config.json that `read_settings` passes over and that say something."""
    model_type = MODEL_TYPES[settings["model_type"]]
    implied = model_type.implied(settings) if model_type.implied else {}
    return [name for name in _unknown(model_type, settings, implied) if _is_harmless(name)]


def decided(settings: Settings) -> list[str]:
    """Which of two places decides, where a config.json that was read says two things."""
    model_type = model_type_of(settings, "config.json")
    lines = told_twice(settings, model_type)
    return lines + heads.told_twice(settings) if "head.outputs" in model_type.fixed else lines


def kept_settings(settings: Settings, model_type: ModelType,
                  head: TaskHead | None = None) -> dict[str, Any]:
    """The settings of an imported config.json that an export, with this head, repeats.

    They change nothing that the model computes. Settings that say what it is are written anew: a
    list of layers or another name of a size that was left beside them could contradict them.
    """
    kept = NEUTRAL.union(model_type.neutral) - WRITTEN_ANEW
    if head is not None:
        kept = kept.difference(heads.HEAD_SETTINGS)
    return {name: value for name, value in settings.items() if name in kept or _is_harmless(name)}


def _build(model_type: ModelType, fields: Settings, where: str) -> ModelConfig:
    """Builds our config. Its errors name our fields, which config.json does not have."""
    try:
        return build(model_type.config, fields, path=where)
    except UserError as error:
        raise UserError(error.expected, error.got,
                        f"{error.fix} (config.json, in lmjax's names)", error.where) from None


def write_settings(config: ModelConfig, model_type: str = "",
                   head: TaskHead | None = None) -> dict[str, Any]:
    """Makes a config.json from which `read_settings` builds a model that computes the same.

    Args:
      config: the model.
      model_type: one of `MODEL_TYPES`; "" takes the first that can express all of `config`.
      head: what the model's head says; None if it has none.

    Raises:
      UserError: that model type, or every one, lacks something that `config` has.
    """
    if model_type not in ("", *MODEL_TYPES):
        raise UserError(f"one of {', '.join(MODEL_TYPES)}", repr(model_type),
                        "choose one of them", "--model-type")
    if config.parametrization != "standard":
        raise UserError("a model whose multipliers are folded into its weights",
                        f"parametrization={config.parametrization} with adapters or packed weights",
                        "merge or unpack them first", "config.model.parametrization")
    names = [model_type] if model_type else [
        name for name, row in MODEL_TYPES.items() if isinstance(config, row.config)]
    reasons = []
    for name in names:
        try:
            row = MODEL_TYPES[name] if head is None else heads.with_head(MODEL_TYPES[name], head)
            settings = _write(row, config) | (heads.head_settings(head) if head else {})
            present = {field: getattr(config, field) for field in row.present}
            found = difference(config, read_settings(settings, name, present))
            if found is None:
                return settings
            lacking = f"{found[0]}={found[1]!r}"
        except (ValueError, AttributeError) as error:
            lacking = str(error)
        reasons.append(f"{name} (which cannot express {lacking})")
    raise UserError(f"one that Hugging Face's {' or '.join(reasons)} computes the same", "another",
                    "choose other switches before training, or keep lmjax's own checkpoint",
                    "model")


def difference(a: ModelConfig, b: ModelConfig) -> tuple[str, Any, Any] | None:
    """Finds the first field in which two models differ in what they compute.

    Returns (field, value of `a`, value of `b`), or None if the models compute the same.
    """
    if type(a) is not type(b):
        return "family", a.family, b.family
    a, b = _resolved(a), _resolved(b)
    for field in dataclasses.fields(a):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        same = mine == other or (  # a float that was converted twice
            isinstance(mine, float) and math.isclose(mine, other, rel_tol=1e-12))
        if field.name not in FREE and not same:
            return field.name, mine, other
    return None


# Reading


def _fields(model_type: ModelType, settings: Settings, where: str,
            present: Mapping[str, Any]) -> dict[str, Any]:
    """The nested fields of our config, as `lmjax.config.build` takes them."""
    _refuse_unknown(model_type, settings, where)
    if "use_sliding_window" in model_type.neutral and not settings.get("use_sliding_window"):
        settings = {**settings, "sliding_window": None}
    fields = {**model_type.fixed, **present}
    fields |= model_type.told(settings) if model_type.told else {}
    for row in model_type.settings:
        value = _value(row, settings, where)
        if row.ours:
            ours = _ours(row, value, where)
            # Two settings of theirs may give one field of ours.
            if ours not in (None, fields.setdefault(row.ours, ours)):
                raise UserError(
                    f"{row.theirs} to agree with what else gives {row.ours}={fields[row.ours]!r}",
                    repr(value), "take a model whose halves are alike", where)
        elif value != row.default and value is not None:
            raise not_computed(f"{row.theirs}={row.default!r}", repr(value), where)
    if fields["norm_eps"] == 0:  # a row of zeros, as padding may be, would become NaN
        raise not_computed("an epsilon of the norms above 0", "0", where, "with another")
    _fill(fields, model_type, settings)
    if model_type.is_local is not None:
        read_layers(fields, model_type, settings, where)
    elif any(kind != "full_attention" for kind in settings.get("layer_types") or ()):
        raise not_computed("layer_types of 'full_attention'", repr(settings["layer_types"]), where)
    if model_type.rope:
        fields |= read_rope(settings, model_type, where)
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        group, _, leaf = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[leaf] = value
    return nested


def _refuse_unknown(model_type: ModelType, settings: Settings, where: str) -> None:
    implied = model_type.implied(settings) if model_type.implied else {}
    for name, expected in implied.items():
        if settings.get(name, expected) != expected:
            raise UserError(f"{name}={expected!r}, as other settings say", repr(settings[name]),
                            "remove the one that is wrong", where)
    for name, values in ONLY.items():
        if model_type.rotary and name == model_type.rotary[0]:
            continue
        if settings.get(name, values[0]) not in values:
            raise not_computed(f"{name}={values[0]}", repr(settings[name]), where)
    for name, value in _unknown(model_type, settings, implied).items():
        if not _is_harmless(name):
            raise UserError("settings that lmjax computes with", f"{name}={value!r}",
                            "remove it if it does not change what the model computes", where)


def _unknown(model_type: ModelType, settings: Settings, implied: Settings) -> Settings:
    """The settings that the model type does not know and that say something."""
    known = NEUTRAL.union(model_type.neutral, model_type.rope, implied, ONLY,
                          (model_type.further_layers,),
                          (ORIGINAL,) if model_type.rope else (),
                          model_type.rotary[:1] if model_type.rotary else (),
                          (row.theirs for row in model_type.settings),
                          (row.alias for row in model_type.settings))
    # An empty setting, or one that is switched off, does nothing. Any other may do something.
    return {name: value for name, value in settings.items()
            if name not in known and value not in (None, False, [], {}, "")}


def _is_harmless(name: str) -> bool:
    """Whether no class reads a setting: a name with a leading underscore is the writer's own."""
    return name in PASSED_OVER or name.startswith("_")


def _value(row: Setting, settings: Settings, where: str) -> Any:
    """What config.json says of a setting, or the default of its class."""
    given = [name for name in (row.theirs, row.alias) if name in settings]
    if len(given) == 2 and settings[row.theirs] != settings[row.alias]:
        raise UserError(f"{row.alias}={settings[row.theirs]!r}, another name of {row.theirs}",
                        repr(settings[row.alias]), "remove the one that is wrong", where)
    return settings[given[0]] if given else row.default


def _ours(row: Setting, value: Any, where: str) -> Any:
    if row.only is not None:
        if value not in row.only:
            raise not_computed(f"{row.theirs} to be one of {', '.join(map(repr, row.only))}",
                               repr(value), where, "with one of them")
        return row.only[value]
    if row.also and value not in row.also and value in row.also.values():
        # Our field says "none" with this value, theirs computes with it.
        raise not_computed(f"{row.theirs} of null or above 0", repr(value), where)
    if row.power:
        if not value > 0:
            raise not_computed(f"{row.theirs} above 0", repr(value), where, "with another")
        return float(value) ** row.power
    if isinstance(value, int) and (row.times, row.plus) != (1, 0):
        return (value - row.plus) // row.times
    return row.also.get(value, value) if row.also else value


def _fill(fields: dict[str, Any], model_type: ModelType, settings: Settings) -> None:
    """Fills in those of their defaults that follow from other settings."""
    if fields.get("mlp_dim", 0) is None:  # GPT-2
        fields["mlp_dim"] = 4 * fields["embed_dim"]
    if _counts_offset(model_type):
        fields["max_positions"] -= fields["position_offset"]
    if "num_encoder_layers" in fields:
        fields["num_layers"] = fields["num_layers"] or fields["num_encoder_layers"]
        if fields.get("scale_output", True) is None:  # T5, whose class takes a null for false
            fields["scale_output"] = "scale_decoder_outputs" not in settings and (
                settings.get("tie_word_embeddings") is not False)
    query_scalar = fields.get("query_scalar")
    if isinstance(query_scalar, int) and not isinstance(query_scalar, bool):
        fields["query_scalar"] = float(query_scalar)


# Writing


def _write(model_type: ModelType, config: ModelConfig) -> dict[str, Any]:
    c = dataclasses.replace(_resolved(config), max_positions=config.max_positions)
    if _counts_offset(model_type):
        c = dataclasses.replace(c, max_positions=c.max_positions + c.position_offset)
    settings: dict[str, Any] = {
        "architectures": [model_type.architecture], "model_type": model_type.name}
    for row in model_type.settings:
        settings[row.theirs] = _theirs(row, _get(c, row.ours)) if row.ours else row.default
    settings |= write_layers(model_type, c)
    if model_type.rope:
        settings |= write_rope(model_type, c)
    settings |= model_type.tell(c) if model_type.tell else {}
    if model_type.name == "t5" and isinstance(c, EncDecConfig):
        # Older versions of transformers read this setting instead of scale_decoder_outputs.
        settings["tie_word_embeddings"] = c.scale_output
    return settings


def _theirs(row: Setting, value: Any) -> Any:
    """Their value for ours. A ValueError names what they cannot express."""
    back = {ours: theirs for theirs, ours in reversed([*(row.only or row.also or {}).items()])}
    if row.only is not None and value not in back:
        raise ValueError(f"{row.ours}={value!r}")
    if row.only is not None and row.only.get(row.default) == value:
        return row.default  # of several names for it, their class's own
    if isinstance(row.default, int) and isinstance(value, float) and value.is_integer():
        return int(value)  # transformers refuses 256.0 for 256
    if row.power:
        return value ** (1 / row.power)
    if (row.times, row.plus) != (1, 0):
        return value * row.times + row.plus
    return back.get(value, value)


def _counts_offset(model_type: ModelType) -> bool:
    """Whether their number of positions includes `position_offset`, as RoBERTa's does."""
    return model_type.fixed.get("positions") == "learned" and any(
        row.ours == "position_offset" for row in model_type.settings)


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _resolved(config: ModelConfig) -> ModelConfig:
    """`config` in one normal form: two configs that compute the same become equal.

    Zeros that stand for another value get that value, the layer pattern covers all layers, and
    fields that the model does not use get one fixed value.
    """
    c = config
    changes: dict[str, Any] = {}
    kinds, pattern = c.kinds(c.num_layers)
    layers = tuple(kinds[pattern[i % len(pattern)]] for i in range(c.num_layers))
    if c.positions != "rope":
        layers = tuple(kind.removesuffix("_nope") for kind in layers)
        changes |= dict(rope_theta=1.0, rotary_fraction=1.0)
    same_theta = c.local_rope_theta == c.rope_theta and c.rope_scaling.kind == "none"
    if c.positions != "rope" or same_theta or "local" not in layers:
        changes |= dict(local_rope_theta=0.0)
    if not c.qk_norm or c.qk_norm_kind == "auto":
        changes |= dict(qk_norm_kind=c.norm if c.norm.startswith("rms") else "rmsnorm")
    if not c.qk_norm:
        changes |= dict(qk_norm_over="head")
    if c.positions != "learned":  # other positions have no end
        changes |= dict(max_positions=1)
    if c.positions != "relative":
        changes |= dict(relative_buckets=32, relative_distance=128)
    if c.parametrization == "standard":
        changes |= dict(base_embed_dim=0, base_num_layers=0, base_head_dim=0)
    if isinstance(c, EncDecConfig):
        changes |= dict(num_encoder_layers=c.num_encoder_layers or c.num_layers)
    if isinstance(c, EncoderConfig):
        changes |= dict(head_activation=c.head_act if c.mlm_head else "gelu",
                        table_dim=c.table_dim or c.embed_dim)
    for name in ("qkv_bias", "out_bias", "mlp_bias"):
        changes[name] = c.use_bias or getattr(c, name)
    if isinstance(c, DecoderConfig):  # it has no other matrices with a bias
        changes |= dict(use_bias=False)
    if c.head.outputs:
        changes |= heads.normal_form(c)
    moe = type(c.moe)()
    if c.moe.experts:
        moe = dataclasses.replace(  # the losses matter only in training
            c.moe, mlp_dim=c.moe.mlp_dim or c.mlp_dim, balance_loss=0.0, z_loss=0.0,
            correction_rate=0.0)
    if moe.groups == 1:  # it holds all experts
        moe = dataclasses.replace(moe, groups=0, top_groups=0)
    return dataclasses.replace(
        c, num_kv_heads=c.dims.num_kv_heads, head_dim=c.dims.head_dim, layer_pattern=layers,
        moe=moe, query_scalar=c.query_scalar or float(c.dims.head_dim),
        sliding_window=c.sliding_window if any(map(is_local, layers)) else 0, **changes)
