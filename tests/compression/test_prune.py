"""Pruning: what is removed, against models with those parts zeroed by hand, and training on."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lm import tiny_lm

import lmjax
from lmjax.cli.main import main
from lmjax.compression.layer_inputs import grams, influences
from lmjax.compression.prune import Pruning, parse_pruning, prune
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.tree import named_leaves

TEXTS = ["".join(f"Document {i} tells of the number {i * i}.\n" for i in range(n, n + 30))
         for n in range(0, 300, 30)]
TOKENS = np.asarray([range(3, 40), range(50, 87)], np.int32)
BLOCK = "layers/block/"


def a_model(**keys) -> LM:
    return tiny_lm(**dict(num_layers=4, embed_dim=32, num_heads=6, num_kv_heads=3, head_dim=8,
                          mlp_dim=24) | keys)


def changed(lm: LM, change) -> LM:
    """The model with `change(path, leaf)` in place of each parameter."""
    params = jax.tree.unflatten(jax.tree.structure(lm.params),
                                [jnp.asarray(change(*pair)) for pair in named_leaves(lm.params)])
    return LM(lm.model, params, lm.layout, lm.tokenizer, lm.recipe, lm.about, lm.source)


def zeroed(lm: LM, index: dict[str, tuple]) -> LM:
    """The model with 0 at these places of the parameters of its layers."""
    def change(path, leaf):
        leaf = np.array(leaf)
        if path.removeprefix(BLOCK) in index:
            leaf[index[path.removeprefix(BLOCK)]] = 0
        return leaf

    return changed(lm, change)


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("text, want", [
    ("layers=2,heads=0.25,mlp=0.5", Pruning(2, 0.25, 0.5)),
    ("weights=2:4", Pruning(weights="2:4")),
    ("mlp=0.1,weights=0.5", Pruning(mlp=0.1, weights=0.5))])
def test_what_is_pruned_is_read_from_one_option(text, want):
    assert parse_pruning(text) == want


@pytest.mark.parametrize("text, message", [
    ("experts=2", "expected layers, heads, mlp, weights, each at most once, got 'experts=2'"),
    ("layers=1,layers=2", "got 'layers=2'"),
    ("layers=0.5", "--prune layers: expected a number of layers, got '0.5'"),
    ("mlp=2:4", "--prune mlp: expected a share such as 0.25, got '2:4'"),
    ("weights=1.5", "weights: expected a share from 0 to below 1, got 1.5"),
    ("mlp=nan", "mlp: expected a share from 0 to below 1, got nan"),
    ("layers=0", "expected layers, heads, mlp or weights to remove, got none")])
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_pruning(text)


@pytest.mark.long
@pytest.mark.parametrize("keys, pruning, texts, message", [
    ({}, Pruning(layers=1), [], "texts to measure layers, heads and channels on, got none"),
    ({}, Pruning(layers=4), TEXTS, "expected fewer than the 4 layers, got 4"),
    ({}, Pruning(heads=0.1), TEXTS, "some, not all, of the 3 key heads, got 0.1"),
    ({"positions": "relative"}, Pruning(heads=0.3), TEXTS, "got positions=relative"),
    ({"moe": {"experts": 2}}, Pruning(mlp=0.5), TEXTS, "expected a model without experts, got 2"),
    ({"mlp_dim": 26}, Pruning(weights="2:4"), [], "a multiple of 4 inputs of layers/block/mlp"),
])
def test_what_a_model_has_not_is_refused(keys, pruning, texts, message, monkeypatch):
    monkeypatch.setattr("jax.jit", lambda fn, **_: lambda key: jax.eval_shape(fn, key))
    with pytest.raises(UserError, match=message):
        prune(a_model(**keys), pruning, texts=texts, log=quiet)


@pytest.mark.long
@pytest.mark.parametrize("keys", [{}, {"positions": "learned", "use_bias": True, "mlp": "gelu",
                                       "norm": "layernorm", "num_kv_heads": 0}])
def test_useless_parts_are_found_and_the_smaller_model_is_the_one_without_them(keys):
    lm = a_model(**keys)
    groups = lm.model.config.dims.num_kv_heads
    each = 6 // groups
    # Layer 2 adds nothing. In the others another group of heads and other channels add little.
    layers, rng = np.arange(4)[:, None], np.random.default_rng(0)
    heads = np.stack([rng.choice(groups, groups // 3, replace=False) for _ in range(4)])
    queries = (heads[..., None] * each + np.arange(each)).reshape(4, -1)
    channels = np.stack([rng.choice(24, 6, replace=False) for _ in range(4)])

    def faint(path, leaf):
        leaf, name = np.array(leaf), path.removeprefix(BLOCK)
        if name == "attention/out/kernel":
            leaf[layers, queries] *= 1e-3
        elif name == "mlp/down/kernel":
            leaf[layers, channels] *= 1e-3
        if name.startswith(("attention/out", "mlp/down")):
            leaf[2] = 0
        return leaf

    lm = changed(lm, faint)
    small = prune(lm, Pruning(layers=1, heads=1 / 3, mlp=0.25), texts=TEXTS, log=quiet)
    c = small.model.config
    assert (c.num_layers, c.dims, c.mlp_dim) == (3, (6 - 6 // 3, groups - groups // 3, 8), 18)
    by_hand = zeroed(lm, {"attention/out/kernel": (layers, queries),
                          "mlp/down/kernel": (layers, channels)})
    want = by_hand.logits(TOKENS)
    np.testing.assert_allclose(small.logits(TOKENS), want, atol=1e-5 * np.abs(want).max())
    assert np.max(np.abs(want)) > 2
    assert small.generate(["Document 7"], max_tokens=5, temperature=0) == by_hand.generate(
        ["Document 7"], max_tokens=5, temperature=0)


@pytest.mark.slow
def test_the_measures_are_those_of_a_model_run_layer_by_layer():
    """The influence from the states of models cut short, the energy of heads by taking each out."""
    lm = a_model(num_layers=2)
    [score, _] = influences(lm, TEXTS)
    one = changed(lm, lambda path, leaf: leaf)
    tokens = np.concatenate([[lm.tokenizer.bos_id, *x] for x in lm.tokenizer.encode_batch(TEXTS)])
    tokens = tokens[: len(tokens) // 64 * 64].reshape(-1, 64)
    tokens = jnp.asarray(tokens[: len(tokens) // 8 * 8], jnp.int32)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens),
             "positions": jnp.broadcast_to(jnp.arange(64)[None], tokens.shape)}
    config = dataclasses.replace(lm.model.config, num_layers=1)
    short = lmjax.models.model.build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[:1] if "layers" in str(path[0]) else leaf, one.params)
    params["norm"] = jax.tree.map(jnp.ones_like, params["norm"])
    states, _ = short.states(params, batch)
    embedded = lm.params["embedding"]["table"][tokens]
    # The norm after the last layer scales each token's state, which leaves its direction.
    cosine = jnp.sum(states * embedded, -1) / (
        jnp.linalg.norm(states, axis=-1) * jnp.linalg.norm(embedded, axis=-1))
    assert score == pytest.approx(float(1 - jnp.mean(cosine)), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config, kept", [
    (dict(sliding_window=8, layer_pattern=("local", "global")), ("local", "global", "global")),
    (dict(embedding_norm="first"), ())])
def test_layers_keep_their_kinds_and_the_first_stays_if_it_norms_the_embeddings(config, kept):
    lm = a_model(**config)
    useless = 2 if kept else 0
    lm = zeroed(lm, {f"{name}/kernel": (useless,) for name in ("attention/out", "mlp/down")})
    small = prune(lm, Pruning(layers=1), texts=TEXTS, log=quiet)
    if kept:
        kinds, pattern = small.model.config.kinds(3)
        assert tuple(kinds[pattern[i % len(pattern)]] for i in range(3)) == ("local", "global",
                                                                            "global")
        want = lm.logits(TOKENS)
        np.testing.assert_allclose(small.logits(TOKENS), want, atol=1e-5 * np.abs(want).max())
    else:
        np.testing.assert_array_equal(
            small.params["layers"]["block"]["mlp_norm"]["scale"][0],
            lm.params["layers"]["block"]["mlp_norm"]["scale"][0])
        np.testing.assert_array_equal(
            small.params["layers"]["block"]["attention"]["query"]["kernel"][0],
            lm.params["layers"]["block"]["attention"]["query"]["kernel"][0])


def _rows(lm: LM, name: str) -> np.ndarray:
    """The matrix of a layer's kernel as [L, outputs, inputs]."""
    leaf = np.asarray(dict(named_leaves(lm.params))[f"{BLOCK}{name}/kernel"])
    inputs = 48 if name == "attention/out" else leaf.shape[1]
    return leaf.reshape(len(leaf), inputs, -1).swapaxes(1, 2)


@pytest.mark.long
@pytest.mark.parametrize("texts, share", [([], 0.5), (TEXTS, "2:4"), (TEXTS, 0.5)])
def test_zeros_are_where_a_search_over_each_output_puts_them(texts, share):
    lm = a_model(num_layers=2)
    small = prune(lm, Pruning(weights=share), texts=texts, log=quiet)
    seen = grams(lm, texts, quiet) if texts else {}
    for name in ("attention/query", "attention/out", "mlp/gate", "mlp/down"):
        before, after = _rows(lm, name), _rows(small, name)
        norms = np.ones((2, before.shape[2]))
        if texts:
            norms = np.sqrt(np.diagonal(np.asarray(seen[f"{BLOCK}{name}/kernel"]), 0, 1, 2))
        size = 4 if share == "2:4" else before.shape[2]
        for layer in range(2):
            for old, new in zip(before[layer], after[layer], strict=True):
                for at in range(0, len(old), size):
                    part = slice(at, at + size)
                    least = np.argsort(np.abs(old[part]) * norms[layer][part])[: size // 2]
                    want = old[part].copy()
                    want[least] = 0
                    np.testing.assert_array_equal(new[part], want)
    same = ("embedding/table", f"{BLOCK}mlp_norm/scale")
    for path in same:
        np.testing.assert_array_equal(dict(named_leaves(small.params))[path],
                                      dict(named_leaves(lm.params))[path])


def train(workdir: str, texts: list[str], *keys: str) -> int:
    folder = texts[0].rpartition("/")[0]
    return main(["train", "--config", "configs/quickstart.py:tiny", "--workdir", workdir,
                 f"--config.data.sources.0.uri=text:{folder}/*.txt",
                 "--config.data.heldout_fraction=0.2", "--config.eval.every=0",
                 "--config.sample.every=0", "--config.data.tokenizer.vocab_size=300",
                 "--config.optimizer.warmup_steps=0", "--config.optimizer.schedule=constant",
                 *(f"--config.{key}" for key in keys)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, list[str]]:
    """(the directory of a run of two steps, the files of its texts)."""
    folder = tmp_path_factory.mktemp("pruned")
    texts = [str(folder / f"{i:03}.txt") for i in range(40)]
    for i, path in enumerate(texts):
        with open(path, "w") as file:
            file.write(f"Document {i} tells of the number {i * i}.\n" * 20)
    assert train(str(folder / "run"), texts, "train.steps=2") == 0
    return str(folder / "run"), texts


@pytest.mark.slow
def test_the_command_writes_a_smaller_model_and_says_what_went(
        trained, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    run, texts = trained
    assert main(["compress", run, "--out", str(tmp_path / "small"), "--prune",
                 "layers=1,mlp=0.25,weights=2:4", "--texts", *texts]) == 0
    out = capsys.readouterr().out
    assert re.search("layers: [01] of 0 to 1 removed, which turn the residual stream by 0", out)
    assert re.search(r"mlp: 16 of 64 channels removed in every layer, with \d", out)
    assert "50.0% of 7 kinds of matrices are 0, the least by Wanda" in out
    assert ("--config.model.num_layers=1 --config.model.mlp_dim=48 "
            f"--config.train.init_from={tmp_path}/small") in out
    assert "--config.train.keep_zeros=true" in out
    small = lmjax.load(tmp_path / "small")
    assert (small.model.config.num_layers, small.model.config.mlp_dim) == (1, 48)
    assert small.about["pruning"] == {"layers": 1, "heads": 0.0, "mlp": 0.25, "weights": "2:4"}
    down = small.params["layers"]["block"]["mlp"]["down"]["kernel"]
    assert np.all(np.sum(np.asarray(down).reshape(1, 12, 4, 32) == 0, axis=2) == 2)
    assert main(["compress", run, "--out", str(tmp_path / "2"), "--prune", "layers=1",
                 "--weights", "int8"]) == 2
    assert "expected --prune alone, got --weights beside it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_keeps_zeros_bit_for_bit_when_it_is_resumed(trained, tmp_path) -> None:
    run, texts = trained
    sparse, straight, resumed = (str(tmp_path / name) for name in ("sparse", "one", "two"))
    assert main(["compress", run, "--out", sparse, "--prune", "weights=0.5"]) == 0
    start = [f"train.init_from={sparse}", f"data.tokenizer.path={sparse}",
             "train.keep_zeros=true", "optimizer.ema_decay=0.5"]
    assert train(straight, texts, "train.steps=4", *start) == 0
    assert train(resumed, texts, "train.steps=2", *start) == 0
    assert train(resumed, texts, "train.steps=4", *start) == 0
    first = dict(named_leaves(lmjax.load(sparse).params))
    for ema in (False, True):
        one, two = (dict(named_leaves(lmjax.load(d, ema=ema).params)) for d in (straight, resumed))
        for path, leaf in one.items():
            np.testing.assert_array_equal(leaf, two[path], err_msg=path)
            if "/kernel" in path:
                np.testing.assert_array_equal(leaf == 0, first[path] == 0, err_msg=path)
                assert np.mean(leaf != first[path]) > 0.4, path


@pytest.mark.slow
def test_a_smaller_model_is_trained_on_taught_by_the_dense_one_and_exported(
        trained, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the keys that the command prints."""
    run, texts = trained
    small, on = str(tmp_path / "small"), str(tmp_path / "on")
    assert main(["compress", run, "--out", small, "--prune", "layers=1,mlp=0.25", "--texts",
                 *texts]) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("train it on with")]
    keys = [key.removeprefix("--config.") for key in line.split(": ", 1)[1].split()]
    assert train(on, texts, "train.steps=1", *keys, f"distill.teacher={run}") == 0
    assert lmjax.load(on).model.config.mlp_dim == 48
    lmjax.load(small).export(tmp_path / "hf", log=quiet)
    np.testing.assert_allclose(lmjax.load(tmp_path / "hf").logits(TOKENS),
                               lmjax.load(small).logits(TOKENS), atol=1e-5)
