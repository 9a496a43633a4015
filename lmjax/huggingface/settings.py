"""config.json to our model config and back, by the rows of `MODEL_TYPES`.

config.json is read as plain JSON: nothing in it is run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmjax.config import build
from lmjax.errors import UserError
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.schema import NEUTRAL, REQUIRED, ModelType, Setting
from lmjax.models.encdec import EncDecConfig
from lmjax.models.model import ModelConfig

Settings = Mapping[str, Any]
# Fields of our config that do not change what a trained model computes.
FREE = ("dropout", "init_std", "embedding_std", "attention", "scan_layers", "remat")
LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}  # theirs -> ours
# Their settings of RoPE scaling -> fields of ours.
SCALING = {
    "factor": "factor", "original_max_position_embeddings": "original_positions",
    "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor"}
# Kind of RoPE scaling -> the settings that it reads, besides attention_factor.
SCALING_KEYS = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor",
               "high_freq_factor")}


def model_type_of(settings: Settings, where: str) -> ModelType:
    """The model type of a config.json.

    Raises:
      UserError: the model needs code of its own, or its `model_type` is not one of `MODEL_TYPES`.
    """
    known = ", ".join(MODEL_TYPES)
    if settings.get("auto_map"):
        raise UserError("a model that needs no code of its own",
                        f"auto_map={settings['auto_map']!r}",
                        "lmjax never runs a repository's code, use a model type that it knows "
                        f"({known})", where)
    name = settings.get("model_type")
    if name not in tuple(MODEL_TYPES):  # a tuple: `name` may be a list, which has no hash
        raise UserError(f"model_type to be one of {known}", repr(name), "convert it to one of them",
                        where)
    return MODEL_TYPES[name]


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
    except (TypeError, AttributeError, ZeroDivisionError) as error:  # a list for a number, say
        raise UserError("settings as transformers writes them", f"one of another kind ({error})",
                        "fetch it again", where) from None


def _build(model_type: ModelType, fields: Settings, where: str) -> ModelConfig:
    """Builds our config. Its errors name our fields, which config.json does not have."""
    try:
        return build(model_type.config, fields, path=where)
    except UserError as error:
        raise UserError(error.expected, error.got,
                        f"{error.fix} (config.json, in lmjax's names)", error.where) from None


def write_settings(config: ModelConfig, model_type: str = "") -> dict[str, Any]:
    """Makes a config.json from which `read_settings` builds a model that computes the same.

    Args:
      config: the model.
      model_type: one of `MODEL_TYPES`; "" takes the first that can express all of `config`.

    Raises:
      UserError: that model type, or every one, lacks something that `config` has.
    """
    if model_type not in ("", *MODEL_TYPES):
        raise UserError(f"one of {', '.join(MODEL_TYPES)}", repr(model_type),
                        "choose one of them", "--model-type")
    names = [model_type] if model_type else [
        name for name, row in MODEL_TYPES.items() if isinstance(config, row.config)]
    reasons = []
    for name in names:
        row = MODEL_TYPES[name]
        try:
            settings = _write(row, config)
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
        if field.name not in FREE and mine != other:
            return field.name, mine, other
    return None


# Reading


def _fields(model_type: ModelType, settings: Settings, where: str,
            present: Mapping[str, Any]) -> dict[str, Any]:
    """The nested fields of our config, as `lmjax.config.build` takes them."""
    _refuse_unknown(model_type, settings, where)
    fields = {**model_type.fixed, **present}
    for row in model_type.settings:
        value = settings.get(row.theirs, settings.get(row.alias, row.default))
        if value is REQUIRED:
            raise UserError(f"a value for {row.theirs}", "none", "fetch config.json again", where)
        if row.ours:
            ours = _ours(row, value, where)
            # Two settings of theirs may give one field of ours.
            if ours not in (None, fields.setdefault(row.ours, ours)):
                raise UserError(
                    f"{row.theirs} to agree with what else gives {row.ours}={fields[row.ours]!r}",
                    repr(value), "take a model whose halves are alike", where)
        elif value != row.default and value is not None:
            raise _not_computed(f"{row.theirs}={row.default!r}", repr(value), where)
    _fill(fields, settings)
    if model_type.is_local is not None:
        _read_layers(fields, model_type, settings, where)
    elif any(kind != "full_attention" for kind in settings.get("layer_types") or ()):
        raise _not_computed("layer_types of 'full_attention'", repr(settings["layer_types"]), where)
    if model_type.rope:
        fields |= _read_rope(settings, model_type, where)
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        group, _, leaf = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[leaf] = value
    return nested


def _refuse_unknown(model_type: ModelType, settings: Settings, where: str) -> None:
    known = NEUTRAL.union(model_type.neutral, model_type.rope,
                          (row.theirs for row in model_type.settings),
                          (row.alias for row in model_type.settings))
    for name, value in settings.items():
        # An empty setting, or one that is switched off, does nothing. Any other may do something.
        if name not in known and value not in (None, False, [], {}, ""):
            raise UserError("settings that lmjax computes with", f"{name}={value!r}",
                            "remove it if it does not change what the model computes", where)


def _not_computed(expected: str, got: str, where: str, fix: str = "without it") -> UserError:
    return UserError(expected, f"{got}, which lmjax cannot compute", f"take a model {fix}", where)


def _ours(row: Setting, value: Any, where: str) -> Any:
    if row.only is not None:
        if value not in row.only:
            raise _not_computed(f"{row.theirs} to be one of {', '.join(map(repr, row.only))}",
                                repr(value), where, "with one of them")
        return row.only[value]
    if isinstance(value, int) and (row.times, row.plus) != (1, 0):
        return (value - row.plus) // row.times
    return row.also.get(value, value) if row.also else value


def _fill(fields: dict[str, Any], settings: Settings) -> None:
    """Fills in those of their defaults that follow from other settings."""
    if fields.get("mlp_dim", 0) is None:  # GPT-2
        fields["mlp_dim"] = 4 * fields["embed_dim"]
    if "num_encoder_layers" in fields:
        fields["num_layers"] = fields["num_layers"] or fields["num_encoder_layers"]
        if fields.get("scale_output", True) is None:  # T5
            fields["scale_output"] = settings.get("tie_word_embeddings", True)
    if isinstance(fields.get("query_scalar"), int):
        fields["query_scalar"] = float(fields["query_scalar"])


def _read_layers(fields: dict[str, Any], model_type: ModelType, settings: Settings,
                 where: str) -> None:
    """Sets the window and the pattern of local and global layers."""
    num_layers, listed = fields["num_layers"], settings.get("layer_types")
    if listed:
        if set(listed) - set(LAYER_TYPES) or len(listed) != num_layers:
            raise _not_computed(f"layer_types of {', '.join(LAYER_TYPES)} for {num_layers} layers",
                                repr(listed), where, "with one of them")
        kinds = [LAYER_TYPES[kind] for kind in listed]
    else:
        assert model_type.is_local is not None
        # `build` refuses a number of layers that is no integer.
        kinds = ["local" if model_type.is_local(settings, i) else "global"
                 for i in range(num_layers if isinstance(num_layers, int) else 0)]
    if "local" not in kinds or not fields["sliding_window"]:
        fields["sliding_window"] = 0
    elif "global" in kinds:
        period = next(p for p in range(1, len(kinds) + 1)
                      if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
        fields["layer_pattern"] = kinds[:period]


def _read_rope(settings: Settings, model_type: ModelType, where: str) -> dict[str, Any]:
    """The fields of RoPE, from either form that transformers has used.

    The newer form is `rope_parameters`, which may hold one group per kind of layer. The older one
    is `rope_scaling` with the thetas as settings of their own.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    by_kind = {"full_attention": rope} | {k: v for k, v in rope.items() if isinstance(v, Mapping)}
    fields: dict[str, Any] = {}
    names = (("rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention"))
    for (ours, kind), (theirs, default) in zip(names, model_type.rope.items(), strict=False):
        theta = by_kind.get(kind, {}).get("rope_theta", settings.get(theirs, default))
        fields[ours] = theta
    local = by_kind.get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        raise _not_computed("rope_type 'default' of sliding_attention", str(local), where)
    rope = by_kind["full_attention"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return fields
    if kind not in SCALING_KEYS:
        raise _not_computed(f"rope_type to be one of default, {', '.join(SCALING_KEYS)}",
                            repr(kind), where, "with one of them")
    known = {*SCALING, "rope_type", "type", "rope_theta"}
    odd = [name for name, value in rope.items() if name not in known and value is not None]
    if odd:
        raise _not_computed(f"rope settings of {', '.join(SCALING)}", f"{odd[0]}={rope[odd[0]]!r}",
                            where)
    scaling = {SCALING[name]: rope[name] for name in (*SCALING_KEYS[kind], "attention_factor")
               if rope.get(name) is not None}
    if kind == "yarn":
        scaling.setdefault("original_positions", settings.get("max_position_embeddings"))
    return fields | {"rope_scaling": {"kind": kind} | scaling}


# Writing


def _write(model_type: ModelType, config: ModelConfig) -> dict[str, Any]:
    c = dataclasses.replace(_resolved(config), max_positions=config.max_positions)
    settings: dict[str, Any] = {
        "architectures": [model_type.architecture], "model_type": model_type.name}
    for row in model_type.settings:
        settings[row.theirs] = _theirs(row, _get(c, row.ours)) if row.ours else row.default
    if model_type.is_local is not None:
        names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
        settings["layer_types"] = [names[kind] for kind in c.layer_pattern]
        if "use_sliding_window" in model_type.neutral:
            settings["use_sliding_window"] = bool(c.sliding_window)
    if model_type.rope:
        settings |= _write_rope(model_type, c)
    if model_type.name == "t5" and isinstance(c, EncDecConfig):
        # Older versions of transformers read this setting instead of scale_decoder_outputs.
        settings["tie_word_embeddings"] = c.scale_output
    return settings


def _write_rope(model_type: ModelType, c: ModelConfig) -> dict[str, Any]:
    """The settings of RoPE, in the older form, which every version of transformers reads."""
    thetas = (c.rope_theta, c.local_rope_theta or c.rope_theta)
    settings = {**dict(zip(model_type.rope, thetas, strict=False)), "rope_scaling": None}
    scaling = c.rope_scaling
    if scaling.kind == "none":
        return settings
    if scaling.kind not in SCALING_KEYS:
        raise ValueError(f"rope_scaling.kind={scaling.kind!r}")
    values = {name: getattr(scaling, SCALING[name]) for name in SCALING_KEYS[scaling.kind]}
    if scaling.attention_factor:
        values["attention_factor"] = scaling.attention_factor
    return settings | {"rope_scaling": {"rope_type": scaling.kind} | values}


def _theirs(row: Setting, value: Any) -> Any:
    """Their value for ours. A ValueError names what they cannot express."""
    back = {ours: theirs for theirs, ours in reversed([*(row.only or row.also or {}).items()])}
    if row.only is not None and value not in back:
        raise ValueError(f"{row.ours}={value!r}")
    if isinstance(row.default, int) and isinstance(value, float) and value.is_integer():
        return int(value)  # transformers refuses 256.0 for 256
    if (row.times, row.plus) != (1, 0):
        return value * row.times + row.plus
    return back.get(value, value)


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
    same_theta = c.local_rope_theta == c.rope_theta and c.rope_scaling.kind == "none"
    if c.positions != "rope" or same_theta or "local" not in layers:
        changes |= dict(local_rope_theta=0.0)
    if c.positions != "rope":
        changes |= dict(rope_theta=1.0)
    if c.positions != "learned":  # other positions have no end
        changes |= dict(max_positions=1)
    if c.positions != "relative":
        changes |= dict(relative_buckets=32, relative_distance=128)
    if isinstance(c, EncDecConfig):
        changes |= dict(num_encoder_layers=c.num_encoder_layers or c.num_layers)
    moe = type(c.moe)()
    if c.moe.experts:
        moe = dataclasses.replace(  # the losses matter only in training
            c.moe, mlp_dim=c.moe.mlp_dim or c.mlp_dim, balance_loss=0.0, z_loss=0.0)
    return dataclasses.replace(
        c, num_kv_heads=c.dims.num_kv_heads, head_dim=c.dims.head_dim, layer_pattern=layers,
        moe=moe, query_scalar=c.query_scalar or float(c.dims.head_dim),
        sliding_window=c.sliding_window if "local" in layers else 0, **changes)
