"""Which models GGUF files hold: their architectures, settings and tensor names, both ways.

GGUF is the format of llama.cpp. Its files name settings by architecture, and tensors by a scheme of
their own; the package `gguf` translates the tensor names of Hugging Face models.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from lmjax.errors import UserError


class Architecture(NamedTuple):
    """How a Hugging Face model type is written as GGUF."""

    name: str  # of the architecture
    # Whether llama.cpp rotates neighbouring pairs of dimensions, so that the rows of queries and
    # keys are stored in that order.
    pairs: bool = False
    transposed: tuple[str, ...] = ()  # ends of names of tensors that are stored [out, in]
    activations: tuple[str, ...] = ("silu", "swish")  # those that llama.cpp computes for it


ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True),
    "mistral": Architecture("llama", pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gpt2": Architecture("gpt2", transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
                         activations=("gelu_new", "gelu_pytorch_tanh", "gelu_fast")),
}
# Hugging Face's name of a setting, and GGUF's after "ARCHITECTURE.". Those of GPT-2 differ.
SETTINGS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
GPT2_SETTINGS = {
    "n_positions": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}


def library() -> ModuleType:
    """The package `gguf`.

    Raises:
      UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("the package gguf", "none", "pip install 'lmjax[gguf]'",
                        where="GGUF") from None
    found: ModuleType = gguf
    return found


def architecture_of(settings: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a model with these settings of config.json.

    Raises:
      UserError: GGUF holds no such model, or only with settings that are not written yet.
    """
    kind = settings["model_type"]
    if kind not in ARCHITECTURES:
        raise UserError(f"a model of one of the types {', '.join(ARCHITECTURES)}", kind,
                        "export it as a Hugging Face directory", where=where)
    found = ARCHITECTURES[kind]
    activation = settings.get("hidden_act", settings.get("activation_function"))
    if activation not in found.activations:
        raise UserError(f"the activation {found.activations[0]}, which llama.cpp computes for "
                        f"{found.name}", activation, "export it as a Hugging Face directory",
                        where=where)
    if kind == "qwen3" and settings.get("attention_bias"):
        raise UserError("a Qwen3 without biases", "attention_bias=true",
                        "export it as a Hugging Face directory", where=where)
    scaling = settings.get("rope_scaling") or {}
    if settings.get("rope_parameters"):
        scaling = settings["rope_parameters"]
    if (odd := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
        raise UserError("rotary positions without scaling", odd,
                        "export it as a Hugging Face directory", where=where)
    if settings.get("sliding_window") and settings.get("use_sliding_window", True):
        raise UserError("attention without a window, which llama.cpp does not compute for this "
                        "architecture", f"sliding_window={settings['sliding_window']}",
                        "export it as a Hugging Face directory", where=where)
    return found


def settings_of(kind: str) -> dict[str, str]:
    """The names of settings of a model type, and GGUF's."""
    return GPT2_SETTINGS if kind == "gpt2" else SETTINGS


def tensor_namer(architecture: Architecture, layers: int) -> Any:
    """A function from Hugging Face's name of a tensor to GGUF's."""
    gguf = library()
    keys = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(keys[architecture.name], layers)

    def name(theirs: str) -> str:
        stem, dot, end = theirs.rpartition(".")
        found = names.get_name(stem)
        assert found is not None, theirs
        return f"{found}{dot}{end}"

    return name


def paired(w: Any, heads: int) -> Any:
    """Rows of queries or keys, [heads * K, ...], in the order of neighbouring pairs."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def halved(w: Any, heads: int) -> Any:
    """The inverse of `paired`."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def heads_in(name: str, settings: Mapping[str, Any]) -> int:
    """The heads of a tensor of queries or keys, by Hugging Face's name; 0: it is another one."""
    if ".q_proj." in name:
        return int(settings["num_attention_heads"])
    return int(settings["num_key_value_heads"]) if ".k_proj." in name else 0
