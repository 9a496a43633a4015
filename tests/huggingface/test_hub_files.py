"""Weight files as people have them, compared with transformers: the same outputs, or a refusal."""

import dataclasses
import shutil

import numpy as np
import pytest
from exports import CONFIG, write
from hub_models import V, cache, edit, other, ours, rename, same, theirs
from hub_tokenizers import llama

import lmjax
from lmjax import huggingface
from lmjax.data.store import kvstore
from lmjax.data.tokenizers import TokenizerConfig
from lmjax.errors import UserError
from lmjax.huggingface import tensors
from lmjax.huggingface.tokenizers import read_tokenizer
from lmjax.training.pretrained import make_tokenizer

D, F = 16, 24
MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
COMMON = dict(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=40, initializer_range=0.3)
# name -> (the class in transformers, its settings)
MODELS = {
    "llama": ("LlamaForCausalLM", COMMON),
    "llama-tied": ("LlamaForCausalLM", COMMON | dict(tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", COMMON | dict(num_key_value_heads=2)),
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=40,
                                     initializer_range=0.3)),
    "bert": ("BertForMaskedLM", COMMON),
    "bert-untied": ("BertForMaskedLM", COMMON | dict(tie_word_embeddings=False)),
    "roberta": ("RobertaForMaskedLM", COMMON | dict(type_vocab_size=1, pad_token_id=1)),
    "modernbert": ("ModernBertForMaskedLM", COMMON | dict(pad_token_id=0)),
    "t5": ("T5ForConditionalGeneration", dict(
        vocab_size=V, d_model=D, d_kv=8, d_ff=F, num_layers=2, num_heads=2,
        decoder_start_token_id=0)),
    "marian": ("MarianMTModel", dict(
        vocab_size=V, d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=F, decoder_ffn_dim=F, init_std=0.3,
        max_position_embeddings=40, pad_token_id=0, decoder_start_token_id=0)),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """name -> a directory that transformers wrote."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            cls, settings = MODELS[name]
            cls = getattr(transformers, cls)
            model = cls(cls.config_class(**settings))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape))
            made[name] = tmp_path_factory.mktemp("hub") / name
            model.save_pretrained(made[name])
        return made[name]
    return make


BERT, ROBERTA = (f"{name}.embeddings.word_embeddings.weight" for name in ("bert", "roberta"))
T5_EMBED, MARIAN_EMBED = "shared.weight", "model.shared.weight"
# case -> (model, what changes the tensors)
AGREE = {
    "head differs": ("llama-tied", other("model.embed_tokens.weight", "lm_head.weight")),
    "head equal": ("llama-tied", lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].copy()})),
    "head alone": ("llama-tied", rename("model.embed_tokens", "lm_head")),
    "gpt2 head differs": ("gpt2", other("transformer.wte.weight", "lm_head.weight")),
    "bert head differs": ("bert", other(BERT, "cls.predictions.decoder.weight")),
    "bert untied": ("bert-untied", lambda t: t.update(
        {"cls.predictions.decoder.bias": t["cls.predictions.bias"] + 0.5})),
    "bert decoder alone": ("bert", rename("cls.predictions.bias", "cls.predictions.decoder.bias")),
    "roberta head differs": ("roberta", other(ROBERTA, "lm_head.decoder.weight")),
    "modernbert head differs": (
        "modernbert", other("model.embeddings.tok_embeddings.weight", "decoder.weight")),
    "t5 head differs": ("t5", other(T5_EMBED, "lm_head.weight")),
    "t5 encoder's alone": ("t5", rename(T5_EMBED, "encoder.embed_tokens.weight")),
    "t5 cross-attention's bias": ("t5", lambda t: t.update(
        {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight":
         np.ones((32, 2), np.float32)})),
    "marian head differs": ("marian", other(MARIAN_EMBED, "lm_head.weight")),
    "old LayerNorm": ("bert", lambda t: (rename("LayerNorm.weight", "LayerNorm.gamma")(t),
                                         rename("LayerNorm.bias", "LayerNorm.beta")(t),
                                         t.update({"cls.seq_relationship.bias": t[BERT][0, :2],
                                                   "bert.embeddings.position_ids":
                                                   np.arange(40)[None]}))),
    "qwen2 buffers": ("qwen2", lambda t: t.update(
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)
         for i in range(2)})),
    "gpt2 buffers": ("gpt2", lambda t: t.update(
        {"transformer.h.0.attn.bias": np.ones((1, 1, 40, 40), np.float32),
         "transformer.h.1.attn.masked_bias": np.float32([-1e4])})),
}
QUICK = ("bert head differs", "bert untied", "t5 encoder's alone", "head differs")
# case -> (model, what changes the tensors, the message)
REFUSED = {
    "bert biases": ("bert", other("cls.predictions.bias", "cls.predictions.decoder.bias"),
                    "expected cls.predictions.decoder.bias to equal cls.predictions.bias"),
    "roberta biases": ("roberta", other("lm_head.bias", "lm_head.decoder.bias"),
                       "expected lm_head.decoder.bias to equal lm_head.bias"),
    "t5 encoder": ("t5", other(T5_EMBED, "encoder.embed_tokens.weight"),
                   "expected encoder.embed_tokens.weight to equal shared.weight"),
    "t5 both halves": (
        "t5", other(T5_EMBED, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        "to equal shared.weight"),
    "marian decoder": ("marian", other(MARIAN_EMBED, "model.decoder.embed_tokens.weight"),
                       "expected model.decoder.embed_tokens.weight to equal model.shared.weight"),
    "marian positions": ("marian", lambda t: t.update(
        {"model.encoder.embed_positions.weight": t[MARIAN_EMBED][:40] * 2}),
        "expected model.encoder.embed_positions.weight to be the sinusoids"),
    "twice": ("bert", lambda t: t.update({"_orig_mod." + BERT: t[BERT] * 2}),
              f"expected one tensor for {BERT}"),
}


@pytest.mark.parametrize("case", [pytest.param(
    case, marks=[] if case in QUICK else pytest.mark.long) for case in AGREE])
def test_tensors_under_several_names_are_read_as_transformers_reads_them(
        case, directories, tmp_path, capsys):
    name, change = AGREE[case]
    path = shutil.copytree(directories(name), tmp_path / "hf")
    edit(path, change)
    assert same(ours(path), theirs(path))
    # Of T5, whether a head is stored decides: config.json ties nothing in lmjax's reading.
    if case.endswith("head differs") and not case.startswith("t5"):
        assert f"{path}: the head differs from the embedding" in capsys.readouterr().err


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_contradict_each_other_are_refused(case, directories, tmp_path):
    name, change, message = REFUSED[case]
    path = shutil.copytree(directories(name), tmp_path / "hf")
    edit(path, change)
    with pytest.raises(UserError, match=message):
        lmjax.load(path)


@pytest.mark.parametrize("shape, changed", [
    ((), False), ((), True), ((0, 3), False), ((7,), False), ((7,), True), ((5, 3), False),
    ((5, 3), True), ((2, 3, 4), False), ((2, 3, 4), True)])
def test_stored_tensors_are_compared_in_parts(shape, changed, tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    monkeypatch.setattr(tensors, "CHUNK", 6)  # values: less than a whole tensor has
    a = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    b = a.copy()
    b.reshape(-1)[-1:] += changed  # the last value
    save_file({"a": a, "b": b, "c": a.astype(np.float16)}, tmp_path / "model.safetensors")
    stored = tensors.open_tensors(tmp_path)
    assert tensors.equal_tensors(stored["a"], stored["b"]) is not changed
    assert tensors.equal_tensors(stored["a"], stored["c"])  # a type that holds all of its values


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_wrapped_models_are_read(wrapper, directories, tmp_path):
    path = shutil.copytree(directories("qwen2"), tmp_path / "hf")
    expected = theirs(path)
    edit(path, rename("", wrapper))
    assert same(ours(path), expected)


def test_an_untied_encoder_is_exported_with_its_head(directories, tmp_path):
    path = shutil.copytree(directories("bert-untied"), tmp_path / "hf")
    edit(path, AGREE["bert untied"][1])
    lmjax.load(path).export(tmp_path / "out", log=lambda line: None)
    assert same(theirs(tmp_path / "out"), theirs(path))


def test_a_whole_file_goes_before_an_index(directories, tmp_path):
    import transformers

    path = shutil.copytree(directories("llama"), tmp_path / "hf")
    stale = transformers.LlamaForCausalLM.from_pretrained(path)
    stale.model.norm.weight.data *= 2
    stale.save_pretrained(tmp_path / "stale", max_shard_size="10KB")
    for file in (tmp_path / "stale").glob("model*"):
        shutil.copy(file, path)
    assert (path / "model.safetensors.index.json").exists()
    assert same(ours(path), theirs(path))


@pytest.fixture
def small(tmp_path):
    write(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("variable, below", [
    pytest.param("HF_HOME", "", marks=pytest.mark.long), ("HF_HUB_CACHE", "hub"),
    pytest.param("HUGGINGFACE_HUB_CACHE", "hub", marks=pytest.mark.long)])
def test_a_model_of_the_hub_cache_is_found(variable, below, small, tmp_path, monkeypatch):
    model = cache(tmp_path, small)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / below))
    assert huggingface.locate("org/name") == huggingface.locate(model)
    assert huggingface.identify("org/name").kind == huggingface.identify(model).kind == "hub cache"
    assert huggingface.identify(model).fault is None
    lmjax.load("org/name")
    (model / "refs" / "main").write_text("gone")
    with pytest.raises(UserError, match="expected refs/main to name a snapshot"):
        lmjax.load(model)


def test_a_tokenizer_of_the_hub_cache_is_found_by_its_name(tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    size = read_tokenizer(llama(made)).vocab_size
    model = cache(tmp_path, made)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for path in ("org/name", str(model), str(model / "snapshots" / "abc")):
        config = TokenizerConfig(path=path, vocab_size=size)
        assert make_tokenizer(config, []).vocab_size == size
    (model / "refs" / "main").write_text("gone")
    with pytest.raises(UserError, match="expected refs/main to name a snapshot"):
        make_tokenizer(TokenizerConfig(path="org/name"), [])
    with pytest.raises(UserError, match="or a name in the hub's cache, got 'org/other'"):
        make_tokenizer(TokenizerConfig(path="org/other"), [])


@pytest.mark.long
def test_a_name_that_begins_with_a_tilde_is_no_home(tmp_path, monkeypatch):
    """`./~x` names a file of this directory, everywhere."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "~model", dataclasses.replace(CONFIG, vocab_size=358))
    llama(tmp_path / "~model")
    path = "./~model"
    assert huggingface.identify(path).kind == "model"
    lm = lmjax.load(path)
    lm.export("./~out", log=lambda line: None)
    assert (tmp_path / "~out" / "config.json").is_file()
    config = TokenizerConfig(path=path, vocab_size=lm.tokenizer.vocab_size)
    assert make_tokenizer(config, []).hash == lm.tokenizer.hash
    lm.save("./~run")
    lmjax.load("./~run")
    assert kvstore("./~data")["path"] == f"{tmp_path}/~data/"
