"""The settings of RoPE in config.json to fields of our config and back.

transformers has written them in two forms: `rope_scaling` with the thetas as keys of their own, and
`rope_parameters` with the thetas inside. Some model types have one group of them, others
(`ModelType.rope` with two thetas) a group per kind of layer. What a class would ignore without a
word is refused here.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.errors import UserError
from lmjax.huggingface.schema import ModelType
from lmjax.models.model import ModelConfig

Settings = Mapping[str, Any]
# By whether a model type has a group per kind of layer: there, its class looks for it elsewhere.
TRUNCATE = {True: (True, None), False: (True, False, None)}
KINDS = ("full_attention", "sliding_attention")
# Their settings of RoPE scaling -> fields of ours.
SCALING = {
    "factor": "factor", "original_max_position_embeddings": "original_positions",
    "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor",
    "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}
UNSET = ("attention_factor", "mscale", "mscale_all_dim")  # 0 of these stands for the usual one
# Kind of RoPE scaling -> (settings that it must have, settings that it may have).
SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "yarn": (("factor",), ("beta_fast", "beta_slow", *UNSET)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ())}
PARTIAL = "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"  # of yarn and llama3
# More settings of a group, which mean what lmjax computes only with these values.
NEUTRAL_VALUES = {PARTIAL: (1.0, None),
                  "finetuned": (True, False)}  # a note of the first models with yarn


def read_rope(settings: Settings, model_type: ModelType, where: str) -> dict[str, Any]:
    """The fields of RoPE.

    Raises:
      UserError: two settings contradict each other, a class of transformers would ignore one, or
        lmjax does not compute it.
    """
    full, local = _groups(settings, model_type, where)
    fields: dict[str, Any] = {}
    if model_type.rotary is not None:
        theirs, default = model_type.rotary
        fields["rotary_fraction"] = full.get(PARTIAL, settings.get(theirs, default))
    names = zip(("rope_theta", "local_rope_theta"), (full, local), model_type.rope.items(),
                strict=False)
    for ours, group, (theirs, default) in names:
        fields[ours] = group.get("rope_theta", settings.get(theirs, default))
    if _kind(local) != "default":
        raise UserError("rope_type 'default' of sliding_attention",
                        f"{dict(local)}, which lmjax cannot compute", "take a model without it",
                        where)
    return fields | _scaling(full, settings, model_type, where)


def told_twice(settings: Settings, model_type: ModelType) -> list[str]:
    """What two places of a config.json that was read say of RoPE differently, and which decides."""
    scaling, rope = (settings.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    thetas = [settings.get(name) for name in model_type.rope]
    if not thetas or not (scaling or rope):
        return []
    by_kind = len(thetas) == 2
    full, local = (rope.get(kind) or {} for kind in KINDS) if by_kind else (rope, {})
    same = {"rope_type": _kind(scaling), "type": _kind(scaling),
            "rope_theta": scaling.get("rope_theta", thetas[0])}
    unread = [key for key, value in full.items() if value != same.get(key, scaling.get(key))]
    if scaling and unread:
        out = [f"rope_scaling decides over rope_parameters, whose {unread[0]} differs"]
    else:
        out = []
    for group, theta in ((scaling or full, thetas[0]), (local, thetas[-1])):
        for name, other in (("rope_theta", theta), ("rope_type", group.get("type"))):
            if name in group and other not in (None, group[name]):
                out.append(f"{name}={group[name]!r} decides over {other!r} elsewhere")
    return out


def write_rope(model_type: ModelType, c: ModelConfig) -> dict[str, Any]:
    """The settings of RoPE, in the older form, which every version of transformers reads.

    Raises:
      ValueError: the message names a scaling that transformers does not have.
    """
    thetas = (c.rope_theta, c.local_rope_theta or c.rope_theta)
    settings = {**dict(zip(model_type.rope, thetas, strict=False)), "rope_scaling": None}
    settings.pop("", None)
    if model_type.rotary is not None:
        settings[model_type.rotary[0]] = c.rotary_fraction
    scaling = c.rope_scaling
    if scaling.kind == "none":
        return settings | ({"rope_scaling": {"rope_type": "default"}} if model_type.default_rope
                           else {})
    if scaling.kind not in SCALING_KEYS:
        raise ValueError(f"rope_scaling.kind={scaling.kind!r}")
    names = [name for part in SCALING_KEYS[scaling.kind] for name in part]
    values = {name: getattr(scaling, SCALING[name]) for name in names
              if name not in UNSET or getattr(scaling, SCALING[name])}
    if scaling.kind != "linear":
        values[ORIGINAL] = scaling.original_positions
    if scaling.kind == "yarn" and not scaling.truncate:
        values["truncate"] = False
    return settings | {"rope_scaling": {"rope_type": scaling.kind} | values}


def _groups(settings: Settings, model_type: ModelType, where: str) -> tuple[Settings, Settings]:
    """The settings of the global layers, and those of the local ones if these have their own."""
    scaling = settings.get("rope_scaling") or {}
    rope = settings.get("rope_parameters") or {}
    by_kind = len(model_type.rope) == 2
    nested = {name: any(isinstance(value, Mapping) for value in group.values())
              for name, group in (("rope_scaling", scaling), ("rope_parameters", rope))}
    if nested["rope_scaling"] or (nested["rope_parameters"] and not by_kind):
        name = "rope_scaling" if nested["rope_scaling"] else "rope_parameters"
        raise UserError(f"one {name} for all layers of a {model_type.name}",
                        f"groups by kind of layer {settings[name]!r}",
                        f"write its values directly into {name}", where)
    if not by_kind:
        _check_both(scaling, rope, settings, model_type, where)
        given = scaling or settings.get("rope_parameters")
        return model_type.default_rope if given is None else given, {}
    if rope and not nested["rope_parameters"]:
        raise UserError(f"rope_parameters by kind of layer ({', '.join(KINDS)})", repr(dict(rope)),
                        "put it under full_attention, and the local layers' under "
                        "sliding_attention", where)
    if scaling and "rope_type" not in scaling:
        # Older versions read "type" here, newer ones ignore it.
        raise UserError("rope_scaling with a rope_type", repr(dict(scaling)),
                        "write rope_type in place of type", where)
    full, local = (rope.get(kind) or {} for kind in KINDS)
    return {**full, **scaling}, local


def _check_both(scaling: Settings, rope: Settings, settings: Settings, model_type: ModelType,
                where: str) -> None:
    """Refuses rope_scaling beside rope_parameters, of which it would drop the theta."""
    (theirs, default), = model_type.rope.items()
    if not scaling or "rope_theta" not in rope or "rope_theta" in scaling:
        return
    left = settings.get(theirs, default)
    if rope["rope_theta"] != left:
        raise UserError(
            "rope_scaling or rope_parameters", f"both, which makes rope_theta {left} in place of "
            f"{rope['rope_theta']}", f"write rope_theta={rope['rope_theta']} into rope_scaling and "
            "remove rope_parameters", where)


def _kind(group: Settings) -> Any:
    return group.get("rope_type", group.get("type", "default"))


def _scaling(rope: Settings, settings: Settings, model_type: ModelType,
             where: str) -> dict[str, Any]:
    kind = _kind(rope)
    turned = rope.get(PARTIAL)
    if model_type.rotary is None and turned not in NEUTRAL_VALUES[PARTIAL]:
        raise UserError("RoPE over whole heads", f"{PARTIAL}={turned!r}, which lmjax "
                        "cannot compute", "take a model without it", where)
    if kind == "default":
        return {}
    kinds = tuple(SCALING_KEYS) if model_type.scaling else ()
    if kind not in kinds:
        raise UserError(f"rope_type to be one of {', '.join(('default', *kinds))}",
                        f"{kind!r}, which lmjax cannot compute", "take a model with one of them",
                        where)
    by_kind = len(model_type.rope) == 2
    neutral = NEUTRAL_VALUES | {"truncate": TRUNCATE[by_kind]}
    known = {*SCALING, *neutral, "rope_type", "type", "rope_theta"}
    if kind != "yarn":
        known -= {"mscale", "mscale_all_dim"}
    odd = [name for name, value in rope.items() if value is not None and name != PARTIAL and (
        name not in known or value not in neutral.get(name, (value,)))]
    if odd:
        raise UserError(f"rope settings of {', '.join(SCALING)}",
                        f"{odd[0]}={rope[odd[0]]!r}, which lmjax cannot compute",
                        "take a model without it", where)
    required, optional = SCALING_KEYS[kind]
    for name in required:
        if rope.get(name) is None:
            raise UserError(f"a value for {name} of rope_type {kind!r}", "none",
                            "write it into the group", where)
    if rope.get("attention_factor") == 0:
        raise UserError("attention_factor above 0", 0, "remove it to have the usual one", where)
    # Their class takes the usual value for a beta of 0.
    values = {SCALING[name]: rope[name] for name in (*required, *optional) if rope.get(name)}
    if kind != "linear":
        values["original_positions"] = _original_positions(rope, settings, model_type, where)
    if kind == "yarn" and not by_kind:  # their class takes null for false
        values["truncate"] = bool(rope.get("truncate", True))
    return {"rope_scaling": {"kind": kind} | values}


def _original_positions(rope: Settings, settings: Settings, model_type: ModelType,
                        where: str) -> Any:
    """The length of rows before scaling: in the group, beside it, or max_position_embeddings."""
    inside, beside = rope.get(ORIGINAL), settings.get(ORIGINAL)
    by_kind = len(model_type.rope) == 2
    if beside is not None and (by_kind or inside not in (None, beside)):
        raise UserError(f"one {ORIGINAL}, inside the rope settings",
                        f"{inside} there and {beside} beside them", "remove the one that is wrong",
                        where)
    row = next(row for row in model_type.settings if row.ours == "max_positions")
    given = beside if inside is None else inside
    return settings.get(row.theirs, row.default) if given is None else given
