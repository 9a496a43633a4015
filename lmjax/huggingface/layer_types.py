"""Which layers have a window and which have no RoPE: config.json to our layer pattern and back."""

from collections.abc import Mapping
from typing import Any

from lmjax.errors import UserError
from lmjax.huggingface.schema import ModelType, not_computed
from lmjax.models.model import ModelConfig

LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}  # theirs -> ours


def read_layers(fields: dict[str, Any], model_type: ModelType, settings: Mapping[str, Any],
                where: str) -> None:
    """Sets the window and the pattern of the kinds of layers.

    Raises:
      UserError: lmjax does not compute one of the kinds, or the class would ignore the list.
    """
    num_layers, listed = fields["num_layers"], settings.get("layer_types")
    if listed and (set(listed) - set(LAYER_TYPES) or len(listed) != num_layers):
        raise not_computed(f"layer_types of {', '.join(LAYER_TYPES)} for {num_layers} layers",
                           repr(listed), where, "with one of them")
    assert model_type.is_local is not None
    # `build` refuses a number of layers that is no integer.
    kinds = ["local" if model_type.is_local(settings, i) else "global"
             for i in range(num_layers if isinstance(num_layers, int) else 0)]
    has_window = bool(fields["sliding_window"])
    if listed:
        named = [LAYER_TYPES[kind] for kind in listed]
        if not model_type.reads_layer_types and named != kinds and has_window:
            raise UserError(f"no layer_types, which a {model_type.name} does not read",
                            repr(listed), "remove it if sliding_window holds for all layers", where)
        kinds = named if model_type.reads_layer_types else kinds
    if model_type.reads_layer_types and "local" in kinds and not has_window:
        raise UserError("a sliding_window for layers of sliding_attention", "none",
                        "set it, or make all layers full_attention", where)
    if "local" not in kinds or not has_window:
        fields["sliding_window"] = 0
        kinds = ["global"] * len(kinds)
    if model_type.nope is not None:
        kinds = [kind + "_nope" * model_type.nope(settings, i, kind == "local")
                 for i, kind in enumerate(kinds)]
    if len(set(kinds)) > 1 or kinds[:1] not in ([], ["local"], ["global"]):
        period = next(p for p in range(1, len(kinds) + 1)
                      if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
        fields["layer_pattern"] = kinds[:period]


def write_layers(model_type: ModelType, config: ModelConfig) -> dict[str, Any]:
    """The settings that say which layers have a window; the config's pattern covers all layers."""
    settings: dict[str, Any] = {}
    if model_type.is_local is None:
        return settings
    names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    if model_type.reads_layer_types:
        settings["layer_types"] = [names[kind.removesuffix("_nope")]
                                   for kind in config.layer_pattern]
    if "use_sliding_window" in model_type.neutral:
        settings["use_sliding_window"] = bool(config.sliding_window)
    return settings
