"""GGUF files against `transformers`, which reads them too, and against the package `gguf`."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_lm import tiny_lm

import lmjax
from lmjax.cli.main import main
from lmjax.compression.quantize import quantize
from lmjax.errors import UserError
from lmjax.huggingface import gguf_import
from lmjax.huggingface.gguf_export import encoded
from lmjax.huggingface.gguf_names import halved, paired
from lmjax.lm import LM
from lmjax.nn.packed import Quantization
from lmjax.tree import named_leaves

gguf = pytest.importorskip("gguf", reason="pip install 'lmjax[gguf]'")
RNG = np.random.default_rng(0)
TEXT = "Document 7 tells\n  of naïve 日本 numbers."


def of_files() -> object:
    """`lmjax.compression.gguf`, which has the name of the package."""
    from lmjax.compression import gguf as ours

    return ours


@pytest.mark.parametrize(("kind", "largest"), [("q8_0", 127), ("q4_0", 8)])
def test_blocks_are_what_the_package_reads(kind: str, largest: int) -> None:
    w = RNG.standard_normal((3, 96)).astype(np.float32)
    types = gguf.GGMLQuantizationType
    near = gguf.quants.dequantize(encoded(w, kind), types[kind.upper()])
    step = np.abs(w.reshape(3, 3, 32)).max(2, keepdims=True) / largest
    # In q4_0 the opposite of the largest weight has no integer, and is one step off.
    bound = step * (1.01 if kind == "q4_0" else 0.51)
    assert (np.abs(near.reshape(3, 3, 32) - w.reshape(3, 3, 32)) <= bound).all()


def test_rows_of_heads_are_paired_and_halved_again() -> None:
    w = np.arange(2 * 6).reshape(12, 1)  # two heads of six dimensions
    assert paired(w, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    np.testing.assert_array_equal(halved(paired(w, 2), 2), w)


def test_a_tokenizer_of_a_file_normalizes_texts_as_it_did() -> None:
    """SentencePiece itself is asked: with a map of characters, and one space for several."""
    spm = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["Document 7 tells of the number 49"] * 20), model_writer=out,
        vocab_size=60, model_type="unigram", hard_vocab_limit=False, minloglevel=2)
    model = sentencepiece_model_pb2.ModelProto.FromString(out.getvalue())
    pieces, rules = model.pieces, model.normalizer_spec
    ours = gguf_import._sentencepiece(
        [p.piece for p in pieces], [p.score for p in pieces], [p.type for p in pieces],
        unigram=True, ids=dict(unknown=0, bos=1, eos=2, padding=None),
        rules=gguf_import.Rules(True, True, rules.precompiled_charsmap))
    before, after, plain = (spm.SentencePieceProcessor(model_proto=proto) for proto in (
        out.getvalue(), ours, gguf_import._sentencepiece(
            [p.piece for p in pieces], [p.score for p in pieces], [p.type for p in pieces],
            unigram=True, ids=dict(unknown=0, bos=1, eos=2, padding=None),
            rules=gguf_import.Rules(True, False, b""))))
    text = "  \uff24ocument  \uff17 tells "  # fullwidth letters and digits
    assert before.encode(text) == after.encode(text) != plain.encode(text)


def made(tmp_path: Path, lm: LM, kind: str = "") -> Path:
    out = tmp_path / "model.gguf"
    of_files().export_gguf(lm, out, kind=kind, log=lambda line: None)
    return out


@pytest.mark.long
@pytest.mark.parametrize(("weights", "kind"), [("", "f32"), ("int8", "q8_0"), ("int4", "q4_0")])
def test_a_model_comes_back_with_its_integers_and_its_tokenizer(
        weights: str, kind: str, tmp_path: Path) -> None:
    lm = tiny_lm(embed_dim=64, mlp_dim=96, num_heads=4, num_kv_heads=2)
    lm = quantize(lm, Quantization(weights, 64)) if weights else lm
    file = made(tmp_path, lm, kind if not weights else "")
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(str(file)).tensors}
    assert kind.upper() in types
    back = of_files().import_gguf(file)
    whole = lm.dense() if weights else lm
    for (name, got), (_, want) in zip(named_leaves(back.params), named_leaves(whole.params),
                                      strict=True):
        # The integers are the same; their scales have 11 bits in the file.
        np.testing.assert_allclose(got, want, rtol=2**-11 if weights else 0, err_msg=name)
    assert [x.tolist() for x in back.tokenizer.encode_batch([TEXT])] == [
        x.tolist() for x in lm.tokenizer.encode_batch([TEXT])]


MODELS = {
    "llama": dict(num_key_value_heads=2),
    "mistral": dict(num_key_value_heads=2, sliding_window=None),
    "qwen2": dict(num_key_value_heads=2),
    "qwen3": dict(num_key_value_heads=2, head_dim=128),
    "gpt2": {},
}


def huggingface_directory(kind: str, folder: Path) -> Any:
    """Writes a small model with random weights and a tokenizer; returns the model."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    sizes = (dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024) if kind == "gpt2" else
             dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                  intermediate_size=96, max_position_embeddings=64))
    config = transformers.AutoConfig.for_model(kind, vocab_size=300, bos_token_id=0,
                                                eos_token_id=0, **sizes, **MODELS[kind])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return model


@pytest.mark.long
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_reads_the_same_model(kind: str, tmp_path: Path) -> None:
    model = huggingface_directory(kind, tmp_path / "hf")
    import torch
    import transformers

    file = made(tmp_path, lmjax.load(tmp_path / "hf"), "f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=file.name).eval()
    tokens = RNG.integers(0, 300, (2, 16)).astype(np.int32)
    with torch.no_grad():
        want, got = (m(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
                     for m in (model, theirs))
    np.testing.assert_allclose(got, want, atol=2e-5)
    back = of_files().import_gguf(file)
    np.testing.assert_allclose(back.logits(tokens), want, atol=2e-5)
    assert back.tokenizer.encode_batch([TEXT])[0].tolist() == byte_level().encode(TEXT).ids


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*MODELS, "sentencepiece"])
def test_llama_cpp_computes_the_same_logits(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    if kind == "sentencepiece":
        lm = tiny_lm(embed_dim=64, mlp_dim=96, num_heads=4, num_kv_heads=2)
    else:
        huggingface_directory(kind, tmp_path / "hf")
        lm = lmjax.load(tmp_path / "hf")
    ids = lm.tokenizer.encode_batch([TEXT])[0]
    f32 = llama_cpp.GGML_TYPE_F32  # its cache is float16 otherwise
    theirs = llama_cpp.Llama(str(made(tmp_path, lm, "f32")), n_ctx=64, logits_all=True,
                             verbose=False, type_k=f32, type_v=f32)
    assert theirs.tokenize(TEXT.encode(), add_bos=False) == ids.tolist()
    theirs.eval(ids.tolist())
    want = np.asarray(lm.logits(ids[None]))[0]
    np.testing.assert_allclose(theirs.scores[: len(ids)], want[:, : theirs.n_vocab()], atol=1e-3)
    theirs.close()


def test_a_tokenizer_is_written_by_the_name_of_the_rule_that_splits_alike() -> None:
    """The oracle is what the models' own tokenizer.json have."""
    from tokenizers import Regex, pre_tokenizers

    from lmjax.huggingface.gguf_byte_level import SPLITS
    from lmjax.huggingface.gguf_byte_level import byte_level as rebuilt
    from lmjax.huggingface.gguf_export import _splits_alike

    theirs = byte_level()
    model = json.loads(theirs.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # Digits that merge tell the rules apart.
    merges = [" ".join(pair) for pair in model["merges"]] + ["1 2", "12 3", "123 4"]
    tokens += ["12", "123", "1234"]
    for split, found in (
            (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
            (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                      pre_tokenizers.ByteLevel(add_prefix_space=False)]), "smollm"),
            (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}{2}"), "isolated"),
                                      pre_tokenizers.ByteLevel(add_prefix_space=False)]), None)):
        theirs = rebuilt(tokens, merges, None, "gpt-2")
        theirs.pre_tokenizer = split
        same = (name for name in SPLITS
                if _splits_alike(theirs, rebuilt(tokens, merges, None, name)))
        assert next(same, None) == found


@pytest.mark.parametrize(("rule", "told", "first"), [
    ("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", None, False),
    ("gpt-2", True, True)])
def test_a_text_begins_with_bos_where_llama_cpp_adds_it(
        rule: str, told: bool | None, first: bool) -> None:
    from lmjax.huggingface.gguf_byte_level import byte_level as rebuilt

    made = rebuilt(["<s>", "a", "b", "ab"], ["a b"], [3, 1, 1, 1], rule, "", "<s>", told)
    assert made.encode("ab").ids == ([0, 3] if first else [3])
    assert made.encode("ab", add_special_tokens=False).ids == [3]


def byte_level() -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    out = tokenizers.Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    out.train_from_iterator([TEXT, "some more words to merge, some more words"] * 20,
                            trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"],
                                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return out


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "x.gguf"
    damaged.write_bytes(b"GGUF" + b"\0" * 40)
    assert main(["import-gguf", str(damaged), "--out", str(tmp_path / "a")]) == 2
    assert "expected a" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert main(["import-gguf", str(tmp_path / "none.gguf"), "--out", str(tmp_path / "a")]) == 2
    assert "expected a GGUF file, got none" in capsys.readouterr().err
    small = quantize(tiny_lm(embed_dim=64, mlp_dim=96), Quantization("int8"))
    with pytest.raises(UserError, match="expected q8_0, f32 or f16 for int8 weights, got q4_0"):
        made(tmp_path, small, "q4_0")
    with pytest.raises(UserError, match="expected groups that are multiples of 32 for q4_0"):
        made(tmp_path, quantize(tiny_lm(embed_dim=64, mlp_dim=96), Quantization("int4", 16)))
    with pytest.raises(UserError, match="expected the activation silu, .* got relu"):
        made(tmp_path, tiny_lm(mlp="reglu"))
    with pytest.raises(UserError, match="expected a model of one of the types"):
        made(tmp_path, tiny_lm(moe={"experts": 2}))
    assert not list(tmp_path.glob("*.part"))
