"""config.json to our model config and back, by the tables of `families`. Read as plain JSON: nothing in it is run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmjax.config import ConfigError, build
from lmjax.interop.families import FAMILIES, NEUTRAL, REQUIRED, Family, Key
from lmjax.models.decoder import DecoderConfig

Settings = Mapping[str, Any]
# What a model computes does not depend on these.
FREE = ("dropout", "init_std", "attention", "scan_layers", "remat")


def family_of(settings: Settings, where: str) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: it needs code of its own, or its `model_type` is not known here.
    """
    if settings.get("auto_map"):
        raise ValueError(f"{where}: expected a model that needs no code of its own, got auto_map="
                         f"{settings['auto_map']!r}; lmjax never runs a repository's code, use a model type that it "
                         f"knows ({', '.join(FAMILIES)})")
    name = settings.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"{where}: expected model_type to be one of {', '.join(FAMILIES)}, got {name!r}; convert it "
                         "to one of them")
    return FAMILIES[name]


def read_settings(settings: Settings, where: str) -> DecoderConfig:
    """Our config for theirs.

    Raises:
      ValueError: a setting that is missing, unknown, or has a value that we would not compute the same with.
    """
    family = family_of(settings, where)
    known = NEUTRAL.union(family.neutral, (key.theirs for key in family.keys))
    for name, value in settings.items():
        # What is empty or switched off does nothing; anything else may.
        if name not in known and value not in (None, False, [], {}, ""):
            raise ValueError(f"{where}: expected settings that lmjax computes with, got {name}={value!r}; remove it if "
                             "it does not change what the model computes")
    fields = dict(family.fixed)
    for key in family.keys:
        value = settings.get(key.theirs, key.default)
        if value is REQUIRED:
            raise ValueError(f"{where}: expected a value for {key.theirs}, got none; fetch config.json again")
        if key.ours:
            fields[key.ours] = _ours(key, value, where)
        elif value != key.default and value is not None:
            raise ValueError(f"{where}: expected {key.theirs}={key.default!r}, got {value!r}, which lmjax cannot "
                             "compute")
    if family.rope:
        fields |= _read_rope(settings, where)
    if "layer_types" in settings:
        _check_layer_types(settings["layer_types"], fields, where)
    if fields.get("mlp_dim") is None:
        fields["mlp_dim"] = 4 * fields["embed_dim"]
    try:
        return build(DecoderConfig, fields, path=where)
    except ConfigError as error:
        raise ValueError(f"{error} (config.json, in lmjax's names)") from None


def write_settings(config: DecoderConfig, model_type: str = "") -> dict[str, Any]:
    """A config.json that `read_settings` reads back as a model that computes the same.

    model_type: the family; "" takes the first that can say all that `config` says.

    Raises:
      ValueError: that family, or none at all, can say it.
    """
    names = [model_type] if model_type else list(FAMILIES)
    if model_type not in ("", *FAMILIES):
        raise ValueError(f"--model-type: expected one of {', '.join(FAMILIES)}, got {model_type!r}; choose one of them")
    reasons = []
    for name in names:
        try:
            settings = _write(FAMILIES[name], config)
            differs = different(config, read_settings(settings, name))
        except ValueError as error:
            differs = str(error)
        if not differs:
            return settings
        reasons.append(f"{name} (which cannot say {differs})")
    raise ValueError("model: expected one that Hugging Face's " + " or ".join(reasons) + " computes the same, got "
                     "another; choose other switches before training, or keep lmjax's own checkpoint")


def different(a: DecoderConfig, b: DecoderConfig) -> str:
    """The first field in which two models differ in what they compute, "" if there is none."""
    a, b = _resolved(a), _resolved(b)
    for field in dataclasses.fields(a):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        if field.name not in FREE and mine != other:
            return f"{field.name}={mine!r}"
    return ""


def _resolved(config: DecoderConfig) -> DecoderConfig:
    dims = config.dims
    return dataclasses.replace(config, num_kv_heads=dims.num_kv_heads, head_dim=dims.head_dim)


def _write(family: Family, config: DecoderConfig) -> dict[str, Any]:
    config = _resolved(config)
    settings: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key in family.keys:
        settings[key.theirs] = _theirs(key, getattr(config, key.ours)) if key.ours else key.default
    if family.rope:
        # The older of the two forms, which every version of transformers reads.
        settings |= {"rope_theta": config.rope_theta, "rope_scaling": None}
    return settings


def _ours(key: Key, value: Any, where: str) -> Any:
    if key.only is not None:
        if value not in key.only:
            raise ValueError(f"{where}: expected {key.theirs} to be one of {', '.join(map(repr, key.only))}, got "
                             f"{value!r}, which lmjax cannot compute")
        return key.only[value]
    return key.also.get(value, value) if key.also else value


def _theirs(key: Key, value: Any) -> Any:
    back = {ours: theirs for theirs, ours in reversed([*(key.only or key.also or {}).items()])}
    if key.only is not None and value not in back:
        raise ValueError(f"{key.ours}={value!r}")
    return back.get(value, value)


def _read_rope(settings: Settings, where: str) -> dict[str, Any]:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{where}: expected rope_type 'default', got {kind!r}, which lmjax cannot compute")
    return {"rope_theta": rope.get("rope_theta", settings.get("rope_theta", 10_000.0))}


def _check_layer_types(types: Any, fields: Mapping[str, Any], where: str) -> None:
    expected = "sliding_attention" if fields.get("sliding_window") else "full_attention"
    for kind in types or ():
        if kind != expected:
            raise ValueError(f"{where}: expected layer_types of {expected!r} only, got {kind!r}, which lmjax cannot "
                             "compute")
