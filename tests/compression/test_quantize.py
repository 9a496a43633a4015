"""`lmjax compress`: GPTQ against rounding to nearest, saved and loaded models, and the ladder."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lm import tiny_lm

import lmjax
from lmjax.cli.main import main
from lmjax.compression.gptq import rounded
from lmjax.compression.quantize import quantize
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.packing import packed_shardings
from lmjax.nn.packed import Quantization, pack
from lmjax.sharding import MeshConfig
from lmjax.tree import named_leaves, num_bytes

INT4 = Quantization("int4", 32)


def test_gptq_changes_products_less_than_rounding_to_nearest() -> None:
    """On inputs that occur together, as in the layers of a model."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((64, 64)) * np.geomspace(1, 0.05, 64)[:, None]
    x = jnp.asarray(rng.standard_normal((512, 64)) @ mix, jnp.float32)
    w = jnp.asarray(rng.standard_normal((48, 64)), jnp.float32)

    def error(near: jnp.ndarray) -> float:
        return float(jnp.sum(jnp.square(x @ (near - w).T)))

    nearest = error(pack(w, "int4", 32).dense(jnp.float32))
    ours = error(rounded(w, x.T @ x, "int4", 32).dense(jnp.float32))
    assert ours < 0.5 * nearest


def test_gptq_of_inputs_that_never_occur_together_cuts_each_group_alone() -> None:
    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.float32)
    near = rounded(w, jnp.eye(64), "int4", 32)
    best = min(float(jnp.sum(jnp.square(pack(w, "int4", 32, shrink).dense(jnp.float32) - w)))
               for shrink in (1.0, 0.9, 0.8))
    assert float(jnp.sum(jnp.square(near.dense(jnp.float32) - w))) <= best


def a_model(seed: int = 0) -> LM:
    return tiny_lm(embed_dim=64, mlp_dim=96, seed=seed)


def test_a_packed_model_cannot_be_packed_again_and_gives_its_float_weights_back() -> None:
    lm = a_model()
    small = quantize(lm, INT4)
    with pytest.raises(UserError, match="expected a model with float32 weights, got int4"):
        quantize(small, INT4)
    again = quantize(small.dense(), INT4)
    for (name, a), (_, b) in zip(named_leaves(small.params), named_leaves(again.params),
                                 strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)


@pytest.mark.long
def test_a_packed_model_explains_and_shows_its_attention() -> None:
    small = quantize(a_model(), INT4)
    text, whole = "Document 7 tells", small.dense()
    np.testing.assert_allclose(small.explain(text).values, whole.explain(text).values, atol=1e-4)
    np.testing.assert_allclose(small.attention_maps(text)[0], whole.attention_maps(text)[0],
                               atol=1e-5)


@pytest.mark.long
def test_a_mesh_computes_what_one_device_does() -> None:
    tokens = np.asarray([[1, 40, 41, 42, 60, 7, 9, 12]] * 4, np.int32)
    sizes = dict(embed_dim=64, mlp_dim=96, num_heads=4, num_kv_heads=2)
    small = quantize(tiny_lm(**sizes), INT4)
    mesh = MeshConfig(data=1, fsdp=2, tensor=2)
    split = quantize(tiny_lm(mesh=mesh, devices=4, **sizes), INT4)
    assert any(len(leaf.sharding.device_set) == 4 and not leaf.is_fully_replicated
               for _, leaf in named_leaves(split.params))
    np.testing.assert_allclose(split.logits(tokens), small.logits(tokens), atol=2e-4)
    # A run that starts from packed weights knows only where its own float weights lie.
    floats = split.layout.tree(split.dense().model.axes, split.dense().model.shapes)
    found = packed_shardings(split.dense().model.functional, floats, INT4)
    for (name, ours), (_, leaf) in zip(named_leaves(found), named_leaves(split.params),
                                       strict=True):
        assert ours.shard_shape(leaf.shape) == leaf.sharding.shard_shape(leaf.shape), name


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(UserError, match="texts of 1,024 tokens or more, got"):
        quantize(a_model(), INT4, texts=["short"])


@pytest.mark.long
def test_gptq_brings_the_logits_of_a_model_nearer() -> None:
    lm = a_model()
    texts = ["".join(f"Document {i} tells of the number {i * i}.\n" for i in range(n, n + 30))
             for n in range(0, 600, 30)]
    [ids] = lm.tokenizer.encode_batch(["Document 7 tells of the number 49.\n" * 3])
    tokens = np.asarray([ids[:60]], np.int32)
    want = lm.logits(tokens)

    def error(small: LM) -> float:
        return float(jnp.mean(jnp.square(small.logits(tokens) - want)))

    ours = error(quantize(lm, INT4, texts=texts, log=lambda line: None))
    assert ours < 0.7 * error(quantize(lm, INT4))


@pytest.mark.long
def test_the_command_writes_a_checkpoint_that_loads_scores_and_exports(
        tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:03}.txt").write_text(f"Document {i} tells of the number {i * i}.\n" * 20)
    run, out = str(tmp_path / "run"), str(tmp_path / "small")
    assert main(["train", "--config", "configs/quickstart.py:tiny", "--workdir", run,
                 f"--config.data.sources.0.uri=text:{folder}/*.txt", "--config.train.steps=2",
                 "--config.optimizer.warmup_steps=0",
                 "--config.data.heldout_fraction=0.2", "--config.eval.every=0",
                 "--config.sample.every=0", "--config.data.tokenizer.vocab_size=300",
                 "--config.quantization.weights=int4", "--config.quantization.group=16"]) == 0
    texts = [str(path) for path in sorted(folder.glob("*.txt"))]
    assert main(["compress", run, "--out", out, "--weights", "int4", "--group", "16",
                 "--texts", *texts]) == 0
    lm, small = lmjax.load(run), lmjax.load(out)
    assert small.model.quantization == Quantization("int4", 16)
    assert num_bytes(small.params) < 0.35 * num_bytes(lm.params)
    assert small.score(["Document 3"])[0].tokens == lm.score(["Document 3"])[0].tokens
    # A run may start from it, with the weights that it stands for, and learn from it.
    assert main(["train", "--config", "configs/quickstart.py:tiny", "--workdir",
                 str(tmp_path / "on"),
                 f"--config.data.sources.0.uri=text:{folder}/*.txt", "--config.train.steps=1",
                 "--config.optimizer.warmup_steps=0",
                 "--config.data.heldout_fraction=0.2", "--config.eval.every=0",
                 "--config.sample.every=0", f"--config.data.tokenizer.path={out}",
                 "--config.data.tokenizer.vocab_size=300",
                 "--config.optimizer.peak_lr=0", f"--config.train.init_from={out}",
                 f"--config.distill.teacher={out}"]) == 0
    on = lmjax.load(str(tmp_path / "on"))
    for (name, a), (_, b) in zip(named_leaves(on.params), named_leaves(small.dense().params),
                                 strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    capsys.readouterr()
    assert main(["compress", run, "--ladder", str(tmp_path / "ladder.png"), "--group", "16",
                 "--texts", *texts]) == 0
    assert "| int4 |" in capsys.readouterr().out and (tmp_path / "ladder.png").stat().st_size
    assert main(["compress", run]) == 2
    assert "expected --out DIR or --ladder PICTURE, got neither" in capsys.readouterr().err
