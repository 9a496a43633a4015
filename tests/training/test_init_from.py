"""Runs that start from existing weights: the first loss, what they record, what is refused."""

import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import (
    assert_same_run,
    finish,
    finish_together,
    lines,
    losses,
    one_line,
    run_here,
    start,
    wait_for,
)

import lmjax
from lmjax import huggingface
from lmjax.config import load
from lmjax.data.pipeline import open_splits
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.tasks.losses import next_token_loss
from lmjax.training.checkpoint import checkpoint_steps, read_about
from lmjax.training.checksums import checksums
from lmjax.training.recipe import build_recipe

pytestmark = pytest.mark.long

SYNTHETIC, TEXT = "configs/synthetic.py:tiny", "configs/quickstart.py:tiny"
MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
STEPS = ("train.steps=24", "checkpoint.every=4", "eval.every=24", "optimizer.ema_decay=0.9",
         "optimizer.warmup_steps=1")
VOCAB = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(a Hugging Face directory with the model of configs/synthetic.py:tiny, its parameters)."""
    config = DecoderConfig(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, vocab_size=64,
                           init_std=0.2)
    model = build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(3))
    folder = tmp_path_factory.mktemp("source") / "hf"
    huggingface.write_directory(folder, model, params, None, log=lambda line: None)
    return folder, params


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    printed = finish(workdir, *STEPS, f"train.init_from={source[0]}", config=SYNTHETIC)
    assert f"weights: those of {source[0]}" in printed
    return workdir


def test_the_first_loss_is_that_of_transformers_on_the_same_rows(source, straight):
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source[0]).eval()
    recipe = build_recipe(load(SYNTHETIC, []))
    batch = open_splits(recipe.data)[0].rows(np.arange(recipe.train.batch_size))
    total = 0.0
    for row in range(recipe.train.batch_size):
        # Document by document, since their model knows no packing.
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == segment
            tokens, targets, mask = (torch.tensor(batch[name][row][inside])
                                     for name in ("tokens", "targets", "loss_mask"))
            with torch.no_grad():
                logits = theirs(input_ids=tokens[None].long()).logits[0]
            nats = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
            total += float((nats * mask).sum())
    assert lines(straight)[0]["loss"] == pytest.approx(total / batch["loss_mask"].sum(), rel=1e-5)


@pytest.mark.slow
def test_killed_and_resumed_ends_as_one_that_never_was(source, straight, tmp_path):
    """The source is needed once: it is gone when the run goes on."""
    workdir, copy = tmp_path / "run", tmp_path / "hf"
    shutil.copytree(source[0], copy)
    options = dict(config=SYNTHETIC,
                   env={"JAX_COMPILATION_CACHE_DIR": str(straight.parent / "cache")})
    process = start(workdir, *STEPS, f"train.init_from={copy}", **options)
    wait_for(process, lambda: checkpoint_steps(workdir / "checkpoints"))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    shutil.rmtree(copy)
    assert "resuming at step" in finish(workdir, *STEPS, f"train.init_from={copy}", **options)
    assert_same_run(straight, workdir, ["metrics.jsonl"])
    for run, path in ((workdir, copy), (straight, source[0])):
        about = read_about(run / "checkpoints" / "24")
        assert about["init_from"] == {"path": str(path), "step": 0,
                                      "checksums": checksums(source[1])}
        assert about["huggingface"]["settings"]["model_type"] == "llama"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A run on text, and the options of another on other text."""
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("a", "tells of the number"), ("b", "asks for the square of")):
        (folder / name).mkdir()
        for i in range(60):
            (folder / name / f"{i:03}.txt").write_text(f"Document {i} {words} {i * i}.\n" * 20)
    options = ["train.steps=2", "optimizer.warmup_steps=1", "checkpoint.every=2", "eval.every=0",
               "sample.every=0",
               "data.heldout_fraction=0.2", f"data.tokenizer.vocab_size={VOCAB}"]
    assert run_here(folder / "a-run", *options, f"data.sources.0.uri=text:{folder}/a/*.txt",
                    config=TEXT) == 0
    return folder, [*options, f"data.sources.0.uri=text:{folder}/b/*.txt"]


@pytest.mark.parametrize("kind", [pytest.param("run", marks=pytest.mark.slow), "hugging face"])
def test_other_text_is_read_with_the_tokenizer_of_the_source(kind, texts, tmp_path):
    folder, options = texts
    lm, where = lmjax.load(folder / "a-run"), folder / "a-run"
    if kind == "hugging face":
        where = tmp_path / "hf"
        lm.export(where, log=lambda line: None)
    assert run_here(tmp_path / "run", *options, f"train.init_from={where}",
                    f"data.tokenizer.path={where}", config=TEXT) == 0
    after = lmjax.load(tmp_path / "run")
    assert after.tokenizer.hash == lm.tokenizer.hash
    batch = open_splits(after.recipe.data, str(tmp_path / "run" / "data"))[0].rows(np.arange(8))
    sums = jax.jit(next_token_loss(lm.model))(lm.params, batch, None)
    first = lines(tmp_path / "run")[0]["loss"]
    assert first == pytest.approx(float(sums.total / sums.weight), rel=1e-5)


def test_what_does_not_fit_is_refused_before_anything_is_compiled(source, texts, tmp_path, capsys,
                                                                  monkeypatch):
    monkeypatch.setattr("lmjax.training.loop._compile", lambda *args: pytest.fail("compiled"))
    folder, options = texts
    cases = [
        (SYNTHETIC, [f"train.init_from={source[0]}", "model.mlp_dim=48"],
         r"config.model.mlp_dim: expected 64 as train.init_from=\S+hf has, got 48; set it to that"),
        (SYNTHETIC, [f"train.init_from={source[0]}", "model.vocab_size=128"],
         "model.vocab_size: expected 64 as"),
        (SYNTHETIC, [f"train.init_from={tmp_path}/nothing"],
         "expected a checkpoint, got none; pass a run's directory"),
        (TEXT, [*options, f"train.init_from={folder}/a-run"],
         r"expected the tokenizer of the data \(\w{12}\), got \S+ with another "
         r".* data.tokenizer.path=\S+a-run"),
        (TEXT, [*options, f"data.tokenizer.path={tmp_path}/nothing"],
         "data.tokenizer.path: expected a SentencePiece"),
        (TEXT, [*options, "data.tokenizer.vocab_size=320", f"data.tokenizer.path={folder}/a-run"],
         f"data.tokenizer.vocab_size: expected {VOCAB}, as "),
    ]
    for i, (config, overrides, message) in enumerate(cases):
        capsys.readouterr()
        assert run_here(tmp_path / str(i), *overrides, config=config) == 2
        printed = capsys.readouterr().err
        refusal = one_line(printed)
        assert refusal == printed.splitlines()[-1] and re.search(message, refusal)
        assert not checkpoint_steps(tmp_path / str(i) / "checkpoints")
        assert not (tmp_path / str(i) / "run.json").exists()


@pytest.mark.slow
def test_a_start_with_other_sentinels_is_refused(texts, tmp_path, capsys):
    folder, _ = texts
    options = ["train.steps=2", "optimizer.warmup_steps=1", "checkpoint.every=2", "eval.every=0",
               "data.seq_len=32", "data.heldout_fraction=0.2", "data.tokenizer.vocab_size=300",
               "model.vocab_size=316", f"data.sources.0.uri=text:{folder}/a/*.txt"]
    first = tmp_path / "first"
    assert run_here(first, *options, config="configs/t5.py:tiny") == 0
    capsys.readouterr()
    assert run_here(tmp_path / "second", *options, "data.objective.sentinels=12",
                    f"train.init_from={first}", f"data.tokenizer.path={first}",
                    config="configs/t5.py:tiny") == 2
    assert "<extra_id_0> as id" in one_line(capsys.readouterr().err)


@pytest.fixture
def moved(texts, tmp_path, monkeypatch):
    """The options of a finished run that began from $HERE/hf, after $HERE has moved."""
    folder, options = texts
    lmjax.load(folder / "a-run").export(tmp_path / "1/hf", log=lambda line: None)
    monkeypatch.setenv("HERE", str(tmp_path / "1"))
    options = [*options, "train.init_from=$HERE/hf", "data.tokenizer.path=$HERE/hf"]
    assert run_here(tmp_path / "run", *options, config=TEXT) == 0
    (tmp_path / "1").rename(tmp_path / "2")
    monkeypatch.setenv("HERE", str(tmp_path / "2"))
    return options


@pytest.mark.slow
def test_a_run_goes_on_when_its_source_is_elsewhere(texts, moved, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_here(run, *moved, config=TEXT) == 0
    printed = capsys.readouterr().err
    assert "finished: all 2 steps" in printed
    assert f'changed since the last start: train.init_from: "{tmp_path}/1/hf"' in printed
    (tmp_path / "2/hf").rename(tmp_path / "2/again")
    assert run_here(run, *moved, config=TEXT) == 2
    assert "data.tokenizer.path=" in one_line(capsys.readouterr().err)
    moved.append(f"data.tokenizer.path={tmp_path}/2/again")
    for init_from, words in [(f"{tmp_path}/2/again", None), ("$HERE/hf", "expected a checkpoint"),
                             ("", "got ''"), (f"{texts[0]}/other", "with others")]:
        if words == "with others":
            lm = lmjax.load(texts[0] / "a-run")
            lm.params = jax.tree.map(lambda x: x + 1, lm.params)
            lm.save(texts[0] / "other")
        code = run_here(run, *moved, f"train.init_from={init_from}", config=TEXT)
        message = capsys.readouterr().err
        assert code == (2 if words else 0), message
        if words:
            message = one_line(message)
            assert "config.train.init_from: expected the weights that this run" in message
            assert words in message


@pytest.mark.slow
def test_several_processes_start_from_the_same_weights(source, straight, tmp_path):
    finish_together(tmp_path / "run", *STEPS, f"train.init_from={source[0]}", "mesh.fsdp=2",
                    config=SYNTHETIC,
                    processes=2, devices=2)
    np.testing.assert_allclose(losses(tmp_path / "run")[:4], losses(straight)[:4], rtol=1e-5)
