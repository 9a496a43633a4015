"""Directories as published models have them, weights and tokenizer: logits and answers agree."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed, so nothing is compared with "
                            "it: pip install lmjax[oracle]")
transformers = pytest.importorskip("transformers", reason="transformers is not installed, so "
                                   "nothing is compared with it: pip install lmjax[oracle]")

from hub_models import edit, rename  # noqa: E402
from hub_tokenizers import SPECIAL, word_piece  # noqa: E402
from tokenizers import processors  # noqa: E402

import lmjax  # noqa: E402

PROMPTS = ["The cat", "A dog ran <image_soft_token>on", "naïve  café\n"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A random Gemma 3 text model whose tokenizer has one token more than its table has rows."""
    path = tmp_path_factory.mktemp("gemma") / "hf"
    vocab = {name: i for i, name in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])}
    pieces = [*(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127)), "\n",
              "▁T", "▁c", "▁ca"]
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(pieces)}
    tokenizer = transformers.GemmaTokenizer(
        vocab=vocab, merges=[("▁", "T"), ("▁", "c"), ("▁c", "a")])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)])
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4,
        max_position_embeddings=64, initializer_range=0.3, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        bos_token_id=2, eos_token_id=1, pad_token_id=0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.save_pretrained(path)
    return path, model, transformers.AutoTokenizer.from_pretrained(path), rows


@pytest.mark.long
def test_a_gemma_3_with_one_token_more_than_rows(gemma):
    path, model, tokenizer, rows = gemma
    assert len(tokenizer) == rows + 1 and tokenizer.convert_tokens_to_ids(
        "<image_soft_token>") == rows
    lm = lmjax.load(path)
    assert lm.tokenizer.vocab_size == lm.model.config.vocab_size == rows
    ids = np.random.default_rng(0).integers(5, rows, (2, 12))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(lm.logits(ids), expected, rtol=0, atol=1e-4)
    for prompt in PROMPTS:
        given = [*lm.tokenizer.prefix, *lm.tokenizer.encode(prompt)]
        theirs = tokenizer(prompt)["input_ids"]
        assert given[0] == tokenizer.bos_token_id and max(given) < rows
        if "<image" not in prompt:  # they have an id for it, and no row
            assert given == theirs
        out = model.generate(torch.tensor([given]), max_new_tokens=16, do_sample=False)[0]
        answer = tokenizer.decode(out[len(given):], skip_special_tokens=True)
        assert lm.generate([prompt], max_tokens=16, temperature=0) == [answer]


@pytest.mark.long
def test_a_gemma_3_is_exported_and_read_again_with_its_tokenizer(gemma, tmp_path):
    path, model, tokenizer, rows = gemma
    lmjax.load(path).export(tmp_path / "out", log=lambda line: None)
    again = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        np.testing.assert_allclose(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    out = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [out(p)["input_ids"] for p in PROMPTS] == [tokenizer(p)["input_ids"] for p in PROMPTS]


def test_a_bert_as_the_hub_has_it(tmp_path):
    """bert-base-uncased: old names of LayerNorm, one bias, a sentence head, names of the class."""
    path = tmp_path / "hf"
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40, initializer_range=0.3)
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(config).eval()
    model.save_pretrained(path)
    size = len(json.loads((word_piece(path) / "tokenizer.json").read_text())["model"]["vocab"])
    (path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    (path / "vocab.txt").write_text("[UNK]\n")
    edit(path, lambda t: (rename("LayerNorm.weight", "LayerNorm.gamma")(t),
                          rename("LayerNorm.bias", "LayerNorm.beta")(t)))
    lm = lmjax.load(path)
    assert lm.tokenizer.vocab_size == size <= 96
    assert lm.tokenizer.decode([lm.tokenizer.bos_id, lm.tokenizer.eos_id]) == ""
    assert SPECIAL[3] == "[MASK]" and len(lm.tokenizer.encode("a [MASK] b")) == 3
    ids = np.random.default_rng(0).integers(3, size, (2, 9))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).prediction_logits.numpy()
    np.testing.assert_allclose(np.asarray(lm.logits(ids))[..., :96], expected, rtol=0, atol=1e-4)
