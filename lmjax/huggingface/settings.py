"""config.json to our model config and back, by the tables of `families`. Read as plain JSON: nothing in it is run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmjax.config import build
from lmjax.errors import UserError
from lmjax.huggingface.families import FAMILIES, NEUTRAL, REQUIRED, Family, Key
from lmjax.models.model import ModelConfig

Settings = Mapping[str, Any]
# What a model computes does not depend on these, nor do T5's and a rotating model's positions end anywhere.
FREE = ("dropout", "init_std", "embedding_std", "attention", "scan_layers", "remat")
MOE_FREE = {"balance_loss": 0.0, "z_loss": 0.0}
# Their names -> ours, for every kind of rope scaling.
SCALING = {"factor": "factor", "original_max_position_embeddings": "original_positions",
           "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor", "beta_fast": "beta_fast",
           "beta_slow": "beta_slow", "attention_factor": "attention_factor"}
SCALING_KEYS = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
                "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")}


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
    if name not in tuple(FAMILIES):
        raise ValueError(f"{where}: expected model_type to be one of {', '.join(FAMILIES)}, got {name!r}; convert it "
                         "to one of them")
    return FAMILIES[name]


def read_settings(settings: Settings, where: str, present: Mapping[str, Any] | None = None) -> ModelConfig:
    """Our config for theirs.

    present: fields that follow from which tensors there are.

    Raises:
      ValueError: a setting that is missing, unknown, or has a value that we would not compute the same with.
    """
    family = family_of(settings, where)
    try:
        return build(family.config, _fields(family, settings, where, present or {}), path=where)
    except UserError as error:
        raise UserError(error.expected, error.got, f"{error.fix} (config.json, in lmjax's names)",
                        where=error.where) from None
    except (TypeError, AttributeError, ZeroDivisionError) as error:  # a list for a number, say
        raise ValueError(f"{where}: expected settings as transformers writes them, got one that is none ({error}); "
                         "fetch it again") from None


def _fields(family: Family, settings: Settings, where: str, present: Mapping[str, Any]) -> dict[str, Any]:
    """Our config as `config.build` takes it."""
    known = NEUTRAL.union(family.neutral, family.rope, (key.theirs for key in family.keys),
                          (key.alias for key in family.keys))
    for name, value in settings.items():
        # What is empty or switched off does nothing; anything else may.
        if name not in known and value not in (None, False, [], {}, ""):
            raise ValueError(f"{where}: expected settings that lmjax computes with, got {name}={value!r}; remove it if "
                             "it does not change what the model computes")
    fields = {**family.fixed, **present}
    for key in family.keys:
        value = settings.get(key.theirs, settings.get(key.alias, key.default))
        if value is REQUIRED:
            raise ValueError(f"{where}: expected a value for {key.theirs}, got none; fetch config.json again")
        if key.ours:
            ours = _ours(key, value, where)
            if ours not in (None, fields.setdefault(key.ours, ours)):  # theirs are two settings, ours is one
                raise ValueError(f"{where}: expected {key.theirs} to agree with what else gives {key.ours}="
                                 f"{fields[key.ours]!r}, got {value!r}; take a model whose halves are alike")
        elif value != key.default and value is not None:
            raise ValueError(f"{where}: expected {key.theirs}={key.default!r}, got {value!r}, which lmjax cannot "
                             "compute; take a model without it")
    _fill(fields, settings)
    if family.layer_types is not None:
        _read_layers(fields, family, settings, where)
    elif any(kind != "full_attention" for kind in settings.get("layer_types") or ()):
        raise ValueError(f"{where}: expected layer_types of 'full_attention', got {settings['layer_types']!r}, which "
                         "lmjax cannot compute; take a model without it")
    if family.rope:
        fields |= _read_rope(settings, family, where)
    groups: dict[str, Any] = {}
    for name, value in fields.items():
        group, _, leaf = name.rpartition(".")
        (groups.setdefault(group, {}) if group else groups)[leaf] = value
    return groups


def write_settings(config: ModelConfig, model_type: str = "") -> dict[str, Any]:
    """A config.json that `read_settings` reads back as a model that computes the same.

    model_type: the family; "" takes the first that can say all that `config` says.

    Raises:
      ValueError: that family, or none at all, can say it.
    """
    if model_type not in ("", *FAMILIES):
        raise ValueError(f"--model-type: expected one of {', '.join(FAMILIES)}, got {model_type!r}; choose one of them")
    names = [model_type] if model_type else [n for n, f in FAMILIES.items() if isinstance(config, f.config)]
    reasons = []
    for name in names:
        family = FAMILIES[name]
        try:
            settings = _write(family, config)
            present = {field: getattr(config, field) for field in family.present}
            found = difference(config, read_settings(settings, name, present))
            if found is None:
                return settings
            differs = f"{found[0]}={found[1]!r}"
        except (ValueError, AttributeError) as error:
            differs = str(error)
        reasons.append(f"{name} (which cannot say {differs})")
    raise ValueError("model: expected one that Hugging Face's " + " or ".join(reasons) + " computes the same, got "
                     "another; choose other switches before training, or keep lmjax's own checkpoint")


def difference(a: ModelConfig, b: ModelConfig) -> tuple[str, Any, Any] | None:
    """The first field in which two models differ in what they compute, with its values; None if there is none."""
    if type(a) is not type(b):
        return "family", a.family, b.family
    a, b = _resolved(a), _resolved(b)
    for field in dataclasses.fields(a):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        if field.name not in FREE and mine != other:
            return field.name, mine, other
    return None


def _resolved(config: ModelConfig) -> ModelConfig:
    """`config` with its zeros and its pattern written out, and one value for what does not matter."""
    c, changes = config, {}
    kinds, pattern = c.kinds(c.num_layers)
    layers = tuple(kinds[pattern[i % len(pattern)]] for i in range(c.num_layers))
    if c.positions != "rope" or c.local_rope_theta == c.rope_theta and c.rope_scaling.kind == "none" or (
            "local" not in layers):
        changes |= dict(local_rope_theta=0.0)
    if c.positions != "rope":
        changes |= dict(rope_theta=1.0)
    if c.positions != "learned":
        changes |= dict(max_positions=1)
    if c.positions != "relative":
        changes |= dict(relative_buckets=32, relative_distance=128)
    if c.family == "encdec":
        changes |= dict(num_encoder_layers=c.num_encoder_layers or c.num_layers)
    moe = dataclasses.replace(c.moe, mlp_dim=c.moe.mlp_dim or c.mlp_dim, **MOE_FREE) if c.moe.experts else type(c.moe)()
    return dataclasses.replace(
        c, num_kv_heads=c.dims.num_kv_heads, head_dim=c.dims.head_dim, layer_pattern=layers, moe=moe,
        query_scalar=c.query_scalar or float(c.dims.head_dim),
        sliding_window=c.sliding_window if "local" in layers else 0, **changes)


def _write(family: Family, config: ModelConfig) -> dict[str, Any]:
    c = dataclasses.replace(_resolved(config), max_positions=config.max_positions)
    settings: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key in family.keys:
        settings[key.theirs] = _theirs(key, _get(c, key.ours)) if key.ours else key.default
    if family.layer_types is not None:
        names = {"local": "sliding_attention", "global": "full_attention"}
        settings["layer_types"] = [names[kind] for kind in c.layer_pattern]
        if "use_sliding_window" in family.neutral:
            settings["use_sliding_window"] = bool(c.sliding_window)
    if family.rope:
        # The older of the two forms, which every version of transformers reads.
        thetas = (c.rope_theta, c.local_rope_theta or c.rope_theta)
        settings |= dict(zip(family.rope, thetas, strict=False)) | {"rope_scaling": None}
        s = c.rope_scaling
        if s.kind != "none":
            if s.kind not in SCALING_KEYS:
                raise ValueError(f"rope_scaling.kind={s.kind!r}")
            settings["rope_scaling"] = {"rope_type": s.kind} | {k: getattr(s, SCALING[k]) for k in SCALING_KEYS[s.kind]}
            if s.attention_factor:
                settings["rope_scaling"]["attention_factor"] = s.attention_factor
    if family.model_type == "t5":
        settings["tie_word_embeddings"] = c.scale_output  # which is how older versions of transformers read it
    return settings


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _ours(key: Key, value: Any, where: str) -> Any:
    if key.only is not None:
        if value not in key.only:
            raise ValueError(f"{where}: expected {key.theirs} to be one of {', '.join(map(repr, key.only))}, got "
                             f"{value!r}, which lmjax cannot compute; take a model with one of them")
        return key.only[value]
    if isinstance(value, int) and (key.times, key.plus) != (1, 0):
        return (value - key.plus) // key.times
    return key.also.get(value, value) if key.also else value


def _theirs(key: Key, value: Any) -> Any:
    back = {ours: theirs for theirs, ours in reversed([*(key.only or key.also or {}).items()])}
    if key.only is not None and value not in back:
        raise ValueError(f"{key.ours}={value!r}")
    if isinstance(key.default, int) and isinstance(value, float) and value.is_integer():
        return int(value)  # which transformers insists on
    return value * key.times + key.plus if (key.times, key.plus) != (1, 0) else back.get(value, value)


def _fill(fields: dict[str, Any], settings: Settings) -> None:
    """Defaults of theirs that follow from other settings."""
    if fields.get("mlp_dim", 0) is None:  # GPT-2
        fields["mlp_dim"] = 4 * fields["embed_dim"]
    if "num_encoder_layers" in fields:
        fields["num_layers"] = fields["num_layers"] or fields["num_encoder_layers"]
        if fields.get("scale_output", True) is None:  # T5
            fields["scale_output"] = settings.get("tie_word_embeddings", True)
    if isinstance(fields.get("query_scalar"), int):
        fields["query_scalar"] = float(fields["query_scalar"])


def _read_layers(fields: dict[str, Any], family: Family, settings: Settings, where: str) -> None:
    """Which layers have the window, as a pattern of ours."""
    names = {"sliding_attention": "local", "full_attention": "global"}
    listed = settings.get("layer_types")
    if listed:
        if set(listed) - set(names) or len(listed) != fields["num_layers"]:
            raise ValueError(f"{where}: expected layer_types of {', '.join(names)} for {fields['num_layers']} layers, "
                             f"got {listed!r}, which lmjax cannot compute; take a model with one of them")
        kinds = [names[kind] for kind in listed]
    else:
        count = fields["num_layers"] if isinstance(fields["num_layers"], int) else 0
        kinds = ["local" if family.layer_types(settings, i) else "global" for i in range(count)]
    if "local" not in kinds or not fields["sliding_window"]:
        fields["sliding_window"] = 0
    elif "global" in kinds:
        period = next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))
        fields["layer_pattern"] = kinds[:period]


def _read_rope(settings: Settings, family: Family, where: str) -> dict[str, Any]:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    by_kind = {"full_attention": rope} | {k: v for k, v in rope.items() if isinstance(v, Mapping)}
    fields: dict[str, Any] = {}
    names = (("rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention"))
    for (ours, kind), (theirs, default) in zip(names, family.rope.items(), strict=False):
        fields[ours] = by_kind.get(kind, {}).get("rope_theta", settings.get(theirs, default))
    if by_kind.get("sliding_attention", {}).get("rope_type", "default") != "default":
        raise ValueError(f"{where}: expected rope_type 'default' of sliding_attention, got "
                         f"{by_kind['sliding_attention']}, which lmjax cannot compute; take a model without it")
    rope = by_kind["full_attention"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        if kind not in SCALING_KEYS:
            raise ValueError(f"{where}: expected rope_type to be one of default, {', '.join(SCALING_KEYS)}, got "
                             f"{kind!r}, which lmjax cannot compute; take a model with one of them")
        odd = [k for k, v in rope.items() if k not in {*SCALING, "rope_type", "type", "rope_theta"} and v is not None]
        if odd:
            raise ValueError(f"{where}: expected rope settings of {', '.join(SCALING)}, got {odd[0]}={rope[odd[0]]!r}, "
                             "which lmjax cannot compute; take a model without it")
        fields["rope_scaling"] = {"kind": kind} | {ours: rope[k] for k, ours in SCALING.items()
                                                   if rope.get(k) is not None and k in (*SCALING_KEYS[kind],
                                                                                        "attention_factor")}
        if kind == "yarn":
            fields["rope_scaling"].setdefault("original_positions", settings.get("max_position_embeddings"))
    return fields
