"""Heads of tasks: where they drop states is where those of `transformers` do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.models.encoder import EncoderConfig
from lmjax.models.heads import Head
from lmjax.tasks.classification import Classification

FACTS = {"labels": ["a", "b"], "counts": [1, 1]}
SIZES = dict(num_layers=1, embed_dim=64, num_heads=4, mlp_dim=64)
BERT = EncoderConfig(**SIZES, pooler=True, token_types=2)
ROBERTA = EncoderConfig(**SIZES, token_types=1, position_offset=2)


@pytest.mark.long
@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_the_head_drops_where_that_of_transformers_does(name):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install lmjax[oracle]")
    transformers = pytest.importorskip("transformers")
    config = Classification(head_kind="pooler", head_dropout=0.5).head(
        BERT if name == "Bert" else ROBERTA, FACTS)
    head = Head(dataclasses.replace(config, outputs=64), 64, init_std=0.2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 9, 64)).astype(np.float32)
    got = np.asarray(head(jnp.asarray(x), jax.random.key(0)))[0, 0]

    theirs = getattr(transformers, f"{name}ForSequenceClassification")(getattr(
        transformers, f"{name}Config")(num_hidden_layers=0, hidden_size=64, num_attention_heads=4,
                                       intermediate_size=64, vocab_size=9, hidden_dropout_prob=0.5))
    dense = theirs.bert.pooler.dense if name == "Bert" else theirs.classifier.dense
    dense.weight.data = torch.tensor(np.asarray(head.dense.kernel).T)
    dense.bias.data.zero_()
    last, seen = theirs.classifier if name == "Bert" else theirs.classifier.out_proj, []
    last.register_forward_hook(lambda module, args, out: seen.append(args[0][0].detach().numpy()))
    pooled = theirs.bert.pooler if name == "Bert" else (lambda states: states)
    tail = (lambda v: theirs.classifier(theirs.dropout(v))) if name == "Bert" else theirs.classifier
    theirs.train()
    tail(pooled(torch.tensor(x)))
    plain = 2 * np.tanh(x[0, 0] @ np.asarray(head.dense.kernel))  # kept values are doubled
    for states in (got, seen[0]):  # whether what is kept is what the matrix gave for all of x
        assert 0.2 < np.mean(states == 0) < 0.8
        same = np.allclose(states[states != 0], plain[states != 0], atol=1e-5)
        assert same == (name == "Bert")
