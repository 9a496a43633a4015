"""Mutated config.json files of every model type, and what transformers makes of each of them.

`mutated(seed)` is one case: a config.json that differs from a small, whole one in one to three
ways. `compare(case)` builds it with transformers, gives both libraries the same weights, and says
how they get on with each other.
"""

import contextlib
import functools
import io
import json
import random
import re
import tempfile
import warnings
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from config_values import BASES, KINDS, OTHER_NAMES, STRANGE, VALUES, V

from lmjax import huggingface
from lmjax.errors import UserError
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.models.model import build_model

T = 10  # tokens of a row


def values_for(key):
    """Values of `key` that are worth trying, if any are known."""
    return next((values for pattern, values in VALUES if re.fullmatch(pattern, key)), [])


def rope_of(rng):
    """One group of rope parameters, in one of the spellings of the past."""
    kind = rng.choice(KINDS[:4] * 3 + KINDS)
    rope = {rng.choice(["rope_type", "rope_type", "type"]): kind}
    if kind != "default" or rng.random() < 0.1:
        rope["factor"] = rng.choice([1.0, 2, 4.0, 8.0])
    if kind == "llama3":
        rope |= dict(low_freq_factor=1.0, high_freq_factor=rng.choice([4.0, 2, 1.0]))
    if kind in ("yarn", "llama3", "longrope") and rng.random() < 0.7:
        rope["original_max_position_embeddings"] = rng.choice([4, 16, 24, 32])
    if kind == "longrope":
        rope |= dict(short_factor=[1.5] * 4, long_factor=[2.0] * 4)
    if kind == "yarn" and rng.random() < 0.5:
        rope |= rng.choice([
            {"attention_factor": 1.3}, {"attention_factor": 0.0}, {"beta_fast": 8, "beta_slow": 2},
            {"mscale": 1.0, "mscale_all_dim": 0.5}, {"truncate": False}, {"truncate": True},
            {"beta_fast": None}, {"mscale": 0.7}, {"beta_fast": 1.0, "beta_slow": 32.0}])
    if rng.random() < 0.6:
        rope["rope_theta"] = rng.choice([10.0, 100.0, 500.0, 1e6])
    if rng.random() < 0.1:
        rope |= rng.choice([{"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0},
                            {"mrope_section": [1, 1, 2]}, {"factor": None}, {"odd": 1},
                            {"type": "linear"}, {"rope_type": None}])
    return rope


def mutate_rope(rng, raw):
    """Gives the rope settings another form."""
    def group():
        if rng.random() < 0.4:
            kinds = ["full_attention", "sliding_attention"][:rng.choice([1, 2, 2])]
            return {kind: rope_of(rng) if rng.random() < 0.6 else {
                "rope_type": "default", "rope_theta": rng.choice([10.0, 500.0])} for kind in kinds}
        return rope_of(rng)

    names = rng.choice([["rope_scaling"], ["rope_parameters"], ["rope_scaling", "rope_parameters"]])
    for name in names:
        raw[name] = group() if rng.random() < 0.95 else rng.choice([{}, None])
    if rng.random() < 0.4:
        for name in ("rope_theta", "rope_local_base_freq", "local_rope_theta", "global_rope_theta"):
            raw.pop(name, None)
    if rng.random() < 0.1:
        raw["original_max_position_embeddings"] = rng.choice([8, 16, 32])


def mutate_layers(rng, raw):
    """Says in another way which layers have a window."""
    num = raw.get("num_hidden_layers", raw.get("num_layers", 2))
    num = num if isinstance(num, int) else 2
    choices = {
        "layer_types": [rng.choice(["full_attention", "sliding_attention"])
                        for _ in range(num + (rng.random() < 0.1))],
        "sliding_window": rng.choice([3, 4, None, 0]),
        "use_sliding_window": rng.choice([True, True, False]),
        "max_window_layers": rng.choice([0, 1, 2, 28]),
        "sliding_window_pattern": rng.choice([1, 2, 3]),
        "global_attn_every_n_layers": rng.choice([1, 2, 3])}
    known = [name for name in choices if name in raw or name == "layer_types"]
    pool = known if rng.random() < 0.8 else [*choices]
    for name in rng.sample(pool, min(len(pool), rng.choice([1, 2, 3]))):
        raw[name] = choices[name]


def mutate_type(rng, raw):
    """Writes one value as another type, or as one that makes no sense."""
    key = rng.choice([*raw])
    value = raw[key]
    odd = [str(value), None, [value], True, False, 0, -1]
    if isinstance(value, (int, float)):
        odd += [float(value), float(value), int(value), -value, value + 0.5]
    raw[key] = rng.choice(odd)


def mutate_name(rng, raw):
    """Calls a key by another name of its class, in place of its own or beside it."""
    names = [name for name in OTHER_NAMES if name in raw]
    if not names:
        return mutate_value(rng, raw)
    name = rng.choice(names)
    value = raw.pop(name) if rng.random() < 0.6 else raw[name]
    same = rng.random() < 0.7 or not isinstance(value, int)
    raw[OTHER_NAMES[name]] = value if same else value * 2
    return None


def mutate_drop(rng, raw):
    raw.pop(rng.choice([*raw]))


def mutate_value(rng, raw):
    """Another value, of a key that is there or that this or another class has."""
    key = rng.choice([*raw, *(key for base in BASES.values() for key in base)])
    if rng.random() < 0.25:
        key = rng.choice([*STRANGE])
    elsewhere = [base[key] for base in BASES.values() if key in base]
    pool = values_for(key) or elsewhere
    raw[key] = rng.choice([*pool, STRANGE[key]] if key in STRANGE else pool or [None, 1])


MUTATIONS = [mutate_rope, mutate_rope, mutate_layers, mutate_type, mutate_name, mutate_drop,
             mutate_drop, mutate_value, mutate_value, mutate_value]


def mutated(seed, model_type=""):
    """A config.json, made from the seed alone; model types take turns."""
    rng = random.Random(seed)
    types = [name for name in BASES if name in MODEL_TYPES]
    model_type = model_type or types[seed % len(types)]
    raw = json.loads(json.dumps(BASES[model_type]))
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
        rng.choice(MUTATIONS)(rng, raw)
    return raw | {"model_type": model_type}


# The oracle


class Broken(Exception):
    """transformers does not load the config, or computes no finite logits with it."""


@functools.cache
def _tokens():
    tokens = np.random.default_rng(0).integers(5, V, (2, T)).astype(np.int32)
    return tokens, np.array([T, T - 3])


def theirs(raw, size=1.0):
    """(tensors, float32 logits) of transformers' model.

    Its weights depend on their names and on `size` alone, by which matrices are multiplied.
    """
    import torch
    import transformers

    model_type = MODEL_TYPES[raw["model_type"]]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity_error()
            cls = getattr(transformers, model_type.architecture)
            # Kimi-K2 has the class of DeepSeek-V3, which names its tensors by its own type.
            own = {"model_type": cls.config_class.model_type}
            config = cls.config_class.from_dict(json.loads(json.dumps(raw)) | own)
            config._attn_implementation = config._experts_implementation = "eager"
            if max(_sizes(config)) > 600:
                raise Broken("too large")
            model = cls(config).float().eval()
            tensors = filled(model, size)
            logits = _logits(model, torch)
    except Broken:
        raise
    except Exception as error:  # whatever it says, it does not load
        raise Broken(f"{type(error).__name__}: {error}") from None
    if not np.isfinite(logits).all():
        raise Broken("no finite logits")
    return tensors, logits


def _sizes(config):
    names = ("vocab_size", "hidden_size", "intermediate_size", "d_ff", "head_dim", "n_inner",
             "moe_intermediate_size", "shared_expert_intermediate_size", "encoder_ffn_dim",
             "decoder_ffn_dim", "d_kv", "decoder_vocab_size")
    few = ("num_hidden_layers", "num_layers", "num_decoder_layers", "decoder_layers", "num_experts",
           "num_local_experts")
    return [getattr(config, name, 0) or 0 for name in names] + [
        50 * (getattr(config, name, 0) or 0) for name in few]


def filled(model, size=1.0):
    """Fills the model, and returns its tensors as transformers writes them."""
    import torch
    from safetensors.torch import load_file

    buffers = [b for k, b in model.named_buffers()
               if k.endswith(("final_logits_bias", "e_score_correction_bias"))]
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *(("bias", b) for b in buffers)]:
            if not p.requires_grad and name != "bias":
                continue
            rng = np.random.default_rng(zlib.crc32(f"{name}{tuple(p.shape)}".encode()))
            ones = float(bool((p == 1).all())) if p.ndim == 1 else 0.0
            # Small embeddings, so that the epsilons of norms show.
            std = 0.06 if any(part in name for part in ("embed", "wte", "shared")) else 0.3
            std *= size if p.ndim > 1 else 1.0
            p.copy_(torch.tensor(ones + std * rng.standard_normal(tuple(p.shape))))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _logits(model, torch):
    tokens, length = _tokens()
    mask = (torch.arange(T)[None] < torch.tensor(length)[:, None]).long()
    inputs = dict(input_ids=torch.tensor(tokens).long(), attention_mask=mask)
    if model.config.is_encoder_decoder:
        inputs |= dict(decoder_input_ids=torch.tensor(tokens[:, ::-1].copy()).long())
    with torch.no_grad():
        return model(**inputs)[0].numpy()


def save(folder, raw, tensors):
    """Writes a directory as transformers would, except that config.json is `raw`."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")


_computed = {}  # (our config, the weights) -> our logits


def ours(folder, tensors):
    """Our logits of the same batch."""
    found = huggingface.read_directory(folder)
    key = repr(found.config), tuple((name, tuple(x.shape), float(x.sum()))
                                    for name, x in sorted(tensors.items()))
    if key not in _computed:
        model = build_model(found.config, vocab_size=0, platform="cpu", dtype=jnp.float32)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = huggingface.read_params(found, model, jax.tree.map(lambda x: sharding,
                                                                    model.shapes))
        _computed[key] = np.asarray(jax.jit(model.logits)(params, _batch(found.config.family)))
    return _computed[key]


def _batch(family):
    tokens, length = _tokens()
    segments = (np.arange(T)[None] < length[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    if family == "encdec":
        batch = {f"encoder_{key}": value for key, value in batch.items()} | {
            "tokens": tokens[:, ::-1], "segment_ids": np.ones_like(segments),
            "positions": positions}
    return batch


def compare(raw):
    """(outcome, detail) of one config.json.

    agree: both load it and compute the same logits; refused: we do not, in one line; theirs fails:
    only transformers does not load it; SILENT: both load it and compute different logits, or we
    load weights that transformers does not; TRACEBACK: we fail without a word.
    """
    try:
        tensors, expected = theirs(raw)
    except Broken as error:
        tensors, expected = None, str(error)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            save(Path(folder), raw, tensors or _base_tensors(raw["model_type"]))
            got = ours(Path(folder), tensors or _base_tensors(raw["model_type"]))
    except UserError as error:
        return ("refused" if tensors else "both refuse") if "\n" not in str(error) else (
            "TRACEBACK"), str(error).replace(folder, "")
    except Exception as error:
        return "TRACEBACK", f"{type(error).__name__}: {error}"
    if tensors is None:
        return "theirs fails", expected
    off = _off(raw, got, expected)
    same = off <= 1e-4
    if 1e-4 < off < 1e-2:
        # Wide layers of large weights are not exact in float32, theirs neither. Where weights are a
        # quarter as large, rounding falls, and another model stays another one: an epsilon that is
        # off by a tenth gives 1e-3 there, another theta 2e-3.
        tensors, expected = theirs(raw, 0.25)
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), raw, tensors)
            same = _off(raw, ours(Path(folder), tensors), expected) <= 5e-5
    return ("agree" if same else "SILENT"), f"off by {off:.2g}"


def _off(raw, got, expected):
    """The largest difference of logits, as a share of the largest logit."""
    real = _batch("encdec" if raw.get("is_encoder_decoder") else "")["segment_ids"].astype(bool)
    return np.abs(got - expected)[real].max() / np.abs(expected[real]).max()


@functools.cache
def _base_tensors(model_type):
    return theirs(BASES[model_type] | {"model_type": model_type})[0]
