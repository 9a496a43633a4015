"""Hugging Face directories, compared with transformers: the same logits and the same bits."""

import functools
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports import CONFIG, settings_of, write
from tiny_settings import (
    COMMON,
    EXPERTS,
    GEMMA,
    GPT2,
    LLAMA,
    MARIAN,
    MODERNBERT,
    ROBERTA,
    T5,
    F,
    V,
)

import lmjax
from lmjax import huggingface
from lmjax.cli.main import main
from lmjax.errors import UserError
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.tensors import open_tensors, read_tensor
from lmjax.sharding import MeshConfig, make_layout
from lmjax.tree import named_leaves

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"


def rope(kind, **keys):
    return dict(rope_parameters={"rope_type": kind, "rope_theta": 500.0, "factor": 4.0, **keys})


# name -> (the class in transformers, its settings)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    # query, key and value have 32, 8 and 8 rows of one matrix
    "phi3": ("Phi3ForCausalLM", LLAMA | dict(num_key_value_heads=1, sliding_window=5,
                                             pad_token_id=0)),
    "gpt2-untied-erf": ("GPT2LMHeadModel", GPT2 | dict(
        tie_word_embeddings=False, activation_function="gelu", n_inner=F)),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-tied": ("LlamaForCausalLM", LLAMA | dict(
        tie_word_embeddings=True, num_key_value_heads=4)),
    "llama3": ("LlamaForCausalLM", LLAMA | rope(
        "llama3", low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
    "llama-yarn": ("LlamaForCausalLM", LLAMA | rope("yarn", original_max_position_embeddings=16)),
    "llama-biases": ("LlamaForCausalLM", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "granite": ("GraniteForCausalLM", LLAMA | dict(
        embedding_multiplier=6.0, logits_scaling=2.0, residual_multiplier=0.5,
        attention_multiplier=0.2)),
    "mistral": ("MistralForCausalLM", LLAMA | dict(sliding_window=4)),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | dict(
        use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | dict(head_dim=16)),
    "mixtral": ("MixtralForCausalLM", LLAMA | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": ("Qwen3MoeForCausalLM", LLAMA | EXPERTS | dict(head_dim=16, norm_topk_prob=True)),
    "qwen2-moe": ("Qwen2MoeForCausalLM", LLAMA | EXPERTS | dict(
        shared_expert_intermediate_size=40)),
    "gemma": ("GemmaForCausalLM", LLAMA | dict(head_dim=16, tie_word_embeddings=True)),
    "gemma2": ("Gemma2ForCausalLM", GEMMA | dict(
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3ForCausalLM", GEMMA | dict(
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}})),
    "bert": ("BertForMaskedLM", COMMON),
    "bert-pooler": ("BertModel", COMMON),
    "roberta": ("RobertaForMaskedLM", ROBERTA),
    "xlm-roberta": ("XLMRobertaForMaskedLM", ROBERTA),
    "camembert": ("CamembertForMaskedLM", ROBERTA),
    "modernbert": ("ModernBertForMaskedLM", MODERNBERT | dict(rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}})),
    "modernbert-bare": ("ModernBertModel", MODERNBERT | dict(
        local_attention=6, layer_types=["sliding_attention", "full_attention"] * 2)),
    "marian": ("MarianMTModel", MARIAN | dict(activation_function="relu", scale_embedding=True)),
    "marian-swish": ("MarianMTModel", MARIAN | dict(activation_function="swish")),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-gated": ("T5ForConditionalGeneration", T5 | dict(
        feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": ("MT5ForConditionalGeneration", T5),
}
BARE = {"bert-pooler": "bert.", "modernbert-bare": "model."}  # models without a head: their prefix


def models(*quick, others=pytest.mark.long):
    """All models; those that are not `quick` get the mark `others`."""
    return [pytest.param(name, marks=[] if name in quick else others) for name in MODELS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(name, dtype, shard size) -> (a directory that transformers wrote, the model)."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")

    @functools.cache
    def make(name, dtype="float32", shard="5GB"):
        torch.manual_seed(0)
        head, settings = MODELS[name]
        cls = getattr(transformers, head)
        config = cls.config_class(**settings, attn_implementation="eager")
        model = cls(config).to(getattr(torch, dtype)).eval()
        with torch.no_grad():  # biases and norms that are all 0 or 1 would hide a mistake
            biases = [b for k, b in model.named_buffers() if k == "final_logits_bias"]
            for p in [*(p for p in model.parameters() if p.requires_grad), *biases]:
                p.add_(0.1 * torch.randn(p.shape).to(p.dtype))
        path = tmp_path_factory.mktemp("hf") / f"{name}-{dtype}"
        model.save_pretrained(path, max_shard_size=shard)
        return path, model
    return make


def outputs_of(model, tokens, length):
    """transformers' float32 logits, or hidden states of a model without a head.

    Tokens from `length` on are padding.
    """
    import torch

    mask = (torch.arange(tokens.shape[1])[None] < torch.tensor(length)[:, None]).long()
    inputs = dict(input_ids=torch.tensor(tokens), attention_mask=mask)
    if model.config.is_encoder_decoder:
        inputs |= dict(decoder_input_ids=torch.tensor(tokens[:, ::-1].copy()))
    with torch.no_grad():
        return model(**inputs)[0].float().numpy()


def batch_of(tokens, length, is_encdec):
    segments = (np.arange(tokens.shape[1])[None] < length[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens.astype(np.int32), "segment_ids": segments, "positions": positions}
    if is_encdec:
        batch = {f"encoder_{key}": value for key, value in batch.items()} | {
            "tokens": batch["tokens"][:, ::-1], "segment_ids": np.ones_like(segments),
            "positions": positions}
    return batch


@pytest.mark.parametrize("name", models("gpt2", "llama3", "qwen2-moe", "gemma3", "bert", "t5"))
def test_imported_models_compute_what_transformers_computes(name, saved):
    path, theirs = saved(name)
    tokens, length = np.random.default_rng(0).integers(3, V, (3, 12)), np.array([12, 7, 1])
    expected = outputs_of(theirs, tokens, length)
    lm = lmjax.load(path)
    batch = batch_of(tokens, length, theirs.config.is_encoder_decoder)
    real = batch["segment_ids"].astype(bool)
    run = (lambda p, b: lm.model.encode(p, b)[0]) if name in BARE else lm.model.logits
    got = np.asarray(jax.jit(run)(lm.params, batch))
    assert np.abs(got - expected)[real].max() <= 2e-5 * np.abs(expected[real]).max()
    assert np.abs(expected[real]).max() > 1


@pytest.mark.parametrize("name", models("llama3", "modernbert-bare", others=pytest.mark.slow))
def test_import_and_export_keep_every_bit(name, saved, tmp_path):
    """The commands turn HF -> our checkpoint -> HF and keep the tensors and the settings."""
    path, theirs = saved(name)
    assert main(["import-hf", str(path), "--out", str(tmp_path / "ours")]) == 0
    assert main(["export-hf", str(tmp_path / "ours"), "--out", str(tmp_path / "back"),
                 "--max-shard-gb", "2e-5"]) == 0
    before, after = open_tensors(path), open_tensors(tmp_path / "back")
    prefix = BARE.get(name, "")  # a model without a head is written as one that could have one
    assert len({entry.file for entry in after.values()}) > 1
    assert {prefix + tensor for tensor in before} == after.keys()
    for tensor, entry in before.items():
        a, b = read_tensor(entry), read_tensor(after[prefix + tensor])
        assert a.dtype == b.dtype, tensor
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32)), tensor
    tokens = np.random.default_rng(1).integers(3, V, (2, 9))
    again = type(theirs).from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    np.testing.assert_array_equal(
        outputs_of(theirs, tokens, [9, 9]), outputs_of(again, tokens, [9, 9]))
    old, new = settings_of(path), settings_of(tmp_path / "back")
    for kept in ("bos_token_id", "attention_dropout", "resid_pdrop"):
        assert old.get(kept) == new.get(kept)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
def test_half_precision_is_exported_as_it_was_imported(dtype, saved, tmp_path):
    path, theirs = saved("llama", dtype, "20KB")
    assert (path / "model.safetensors.index.json").exists()
    lm = lmjax.load(path)
    weight = dict(theirs.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(lm.params["layers"]["block"]["mlp"]["up"]["kernel"][1],
                                  weight.detach().float().numpy().T)
    lm.export(tmp_path / "back", log=lambda line: None)
    after = open_tensors(tmp_path / "back")
    for tensor, entry in open_tensors(path).items():
        assert entry.dtype == after[tensor].dtype
        assert np.array_equal(read_tensor(entry).view(np.uint16),
                              read_tensor(after[tensor]).view(np.uint16))


def test_a_model_saved_without_its_head_is_found(saved, tmp_path):
    path, theirs = saved("gpt2")
    theirs.transformer.save_pretrained(tmp_path / "bare")  # wte.weight, not transformer.wte.weight
    assert not any(name.startswith("transformer.") for name in open_tensors(tmp_path / "bare"))
    a, b = lmjax.load(path).params, lmjax.load(tmp_path / "bare").params
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Models of ours, without transformers


@pytest.mark.parametrize("keys, model_type", [
    ({"tie_embeddings": True, "head_dim": 10}, "llama"),
    pytest.param({"sliding_window": 5}, "mistral", marks=pytest.mark.long),
    pytest.param({"qk_norm": True}, "qwen3", marks=pytest.mark.long),
    pytest.param({"mlp": "reglu"}, "llama", marks=pytest.mark.long),
    pytest.param({"num_kv_heads": 4, "positions": "learned", "norm": "layernorm", "use_bias": True,
                  "mlp": "gelu"}, "gpt2", marks=pytest.mark.long),
    pytest.param({}, "llama", marks=pytest.mark.long)])
def test_an_export_takes_a_model_type_that_can_express_the_model(keys, model_type, tmp_path):
    _, params = write(tmp_path / "out", replace(CONFIG, **keys))
    assert settings_of(tmp_path / "out")["model_type"] == model_type
    jax.tree.map(np.testing.assert_array_equal, lmjax.load(tmp_path / "out").params, params)


@pytest.mark.parametrize("trained, settings, positions", [
    (32, {}, 32),
    pytest.param(0, {}, CONFIG.max_positions, marks=pytest.mark.long),
    (32, {"vocab_size": 64}, CONFIG.max_positions),
    pytest.param(4096, {"vocab_size": 64}, 4096, marks=pytest.mark.long)])
def test_an_export_has_the_positions_of_training(trained, settings, positions, tmp_path):
    """An imported model, which has `settings`, keeps at least the positions that it came with."""
    source = {"settings": settings, "generation": {}, "dtype": "float32"}
    write(tmp_path / "out", max_positions=trained, source=source if settings else None)
    assert settings_of(tmp_path / "out")["max_position_embeddings"] == positions


@pytest.mark.parametrize("model_type, changes, left", [
    ("mistral", {"layer_types": ["full_attention"] * 3, "is_causal": True}, {}),
    ("llama", {"layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_theta": 5.0},
               "original_max_position_embeddings": 8, "sliding_window": 4}, {}),
    ("qwen2", {"layer_types": ["full_attention"] * 3, "max_window_layers": 1,
               "unsloth_fixed": True},
     {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
      "max_window_layers": 1, "unsloth_fixed": True})])
def test_an_export_contradicts_nothing_that_it_writes(model_type, changes, left, tmp_path):
    """What an imported config.json says of the model is written anew, the rest is kept."""
    keys = {"mistral": dict(sliding_window=5), "llama": {}, "qwen2": dict(
        sliding_window=5, qkv_bias=True, layer_pattern=("global", "local", "local"))}[model_type]
    source = {"settings": {"model_type": model_type, "resid_pdrop": 0.1, **changes},
              "generation": {}, "dtype": "float32"}
    write(tmp_path / "out", replace(CONFIG, **keys), source=source)
    written = settings_of(tmp_path / "out")
    known = {row.theirs for row in MODEL_TYPES[model_type].settings}
    assert {name: written[name] for name in changes if name in written and name not in known} == (
        left)
    assert written["resid_pdrop"] == 0.1


def test_what_is_passed_over_is_told_in_one_line(tmp_path, capsys):
    write(tmp_path / "out", source={
        "settings": {"model_type": "llama", "unsloth_fixed": True, "_autoset": True, "fp16": False},
        "generation": {}, "dtype": "float32"})
    for _ in range(2):
        lmjax.load(tmp_path / "out")
    [line] = capsys.readouterr().err.splitlines()
    assert line == (f"{tmp_path}/out/config.json: passes over unsloth_fixed, _autoset, which "
                    "change nothing that the model computes")


def test_a_model_that_no_model_type_can_express_is_not_exported(tmp_path):
    message = r"expected one that .*llama \(which cannot express .*mlp.*gpt2 \(which cannot"
    with pytest.raises(UserError, match=message):
        write(tmp_path / "out", replace(CONFIG, mlp="relu"))
    with pytest.raises(UserError, match="llama .which cannot express qk_norm=True."):
        write(tmp_path / "out", replace(CONFIG, qk_norm=True), model_type="llama")
    assert not list(tmp_path.iterdir())


def test_an_export_that_reads_back_as_another_model_leaves_nothing(tmp_path, monkeypatch):
    """A getter that changes one weight stands in for any mistake in the tables."""
    from lmjax.huggingface import directory

    def spoiled(params, table):
        get = tensor_getter(params, table)
        return lambda name: get(name) * (1.001 if name.endswith("1.mlp.up_proj.weight") else 1)

    tensor_getter = directory.tensor_getter
    monkeypatch.setattr(directory, "tensor_getter", spoiled)
    message = "expected the logits of the checkpoint, got others by up to"
    with pytest.raises(UserError, match=message):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_import_streams_onto_a_mesh(tmp_path, monkeypatch):
    """Each device gets its own shard, and the host never holds more than one tensor."""
    from lmjax.huggingface import weights

    model, params = write(tmp_path / "out")
    sizes, held, peak = [], [0], [0]

    def counted(entry):
        found = read_tensor(entry)
        sizes.append(found.nbytes)
        held[0] += found.nbytes
        peak[0] = max(peak[0], held[0])
        weakref.finalize(found, lambda: held.__setitem__(0, held[0] - found_size))
        found_size = found.nbytes
        return found

    monkeypatch.setattr(weights, "read_tensor", counted)
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = layout.tree(model.axes, model.shapes)
    read = huggingface.read_params(huggingface.read_directory(tmp_path / "out"), model, shardings)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    for (name, leaf), (_, sharding) in zip(
            named_leaves(read), named_leaves(shardings), strict=True):
        assert leaf.sharding == sharding and leaf.dtype == jnp.float32, name
    assert len(sizes) == len(open_tensors(tmp_path / "out"))  # once, not once per device
    assert peak[0] == max(sizes) < sum(sizes) / 4


def test_every_model_type_names_each_tensor_once():
    for model_type in MODEL_TYPES.values():
        rows = [(row.theirs, row.part[0]) for row in model_type.table.values()]
        assert len(set(rows)) == len(rows)
