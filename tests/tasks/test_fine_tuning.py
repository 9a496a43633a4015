"""A fine-tuning run: from a pretrained model to figures; on any mesh, killed, stopped early."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from processes import assert_same_run, finish, lines, losses, one_line, run_here, start, wait_for

import lmjax
from lmjax.training.checkpoint import checkpoint_steps, read_about

pytestmark = pytest.mark.long

CONFIG = """
def get_config():
    return dict(
        task=dict(name="classification"),
        data=dict(sources=[dict(name="s", uri="jsonl:{examples}")], seq_len=32,
                  heldout_fraction=0.2),
        optimizer=dict(peak_lr=1e-2, warmup_steps=4),
        train=dict(steps=24, batch_size=8, init_from="{source}"),
        eval=dict(every=4), checkpoint=dict(every=4, keep_last=9))
"""
MODEL = """
def get_config():
    return dict(
        model=dict(family="{family}", num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4,
                   mlp_dim=64, vocab_size=304, {more}),
        data=dict(sources=[dict(name="t", uri="text:{texts}/*.txt")], seq_len=32,
                  tokenizer=dict(vocab_size=300), curate=dict(workers=1)),
        optimizer=dict(warmup_steps=1), train=dict(steps=4, batch_size=8))
"""
GOOD, BAD, OTHER = "lovely great fine".split(), "awful grim dull".split(), "a b c d e".split()


def sentence(rng, label):
    words = rng.choices(OTHER, k=rng.randint(2, 6)) + rng.choices(GOOD if label else BAD, k=2)
    rng.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Examples, texts, and a pretrained encoder and decoder."""
    made, rng = tmp_path_factory.mktemp("fine"), random.Random(0)
    rows = [{"text": sentence(rng, i % 2), "label": ["bad", "good"][i % 2]} for i in range(200)]
    (made / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "texts").mkdir()
    for i in range(40):
        text = "\n".join(sentence(rng, rng.random() < 0.5) for _ in range(10))
        (made / f"texts/{i}.txt").write_text(text)
    for family, more in (("encoder", "mlp='gelu'"), ("decoder", "tie_embeddings=False")):
        config = made / f"{family}.py"
        config.write_text(MODEL.format(family=family, more=more, texts=made / "texts"))
        assert run_here(made / family, config=str(config)) == 0
        (made / f"{family}_task.py").write_text(CONFIG.format(
            examples=made / "examples.jsonl", source=made / family))
    return made


@pytest.fixture(scope="module")
def straight(folder):
    printed = finish(folder / "straight", config=str(folder / "encoder_task.py"))
    return folder / "straight", printed


def test_a_pretrained_encoder_learns_the_classes_and_says_what_is_new(straight):
    workdir, printed = straight
    assert re.search(r"new: task_head/bias, task_head/table\n", printed)
    found = [record for record in lines(workdir) if "eval/accuracy" in record]
    assert [record["step"] for record in found] == [4, 8, 12, 16, 20, 24]
    assert found[-1]["eval/accuracy"] > 0.9
    answers = lines(workdir, "answers/eval.jsonl")
    right = np.mean([line["answer"]["label"] == line["truth"] for line in answers])
    assert right == pytest.approx(found[-1]["eval/accuracy"])
    about = read_about(workdir / "checkpoints" / "24")
    assert about["task"]["labels"] == ["bad", "good"]
    assert about["recipe"]["model"]["head"]["outputs"] == 2
    assert "bits/byte" not in printed


def test_the_report_shows_the_metric_the_confusions_and_the_errors(straight):
    page = (straight[0] / "report.html").read_text()
    for words in ("Confusion matrix", "model for classification", "held-out accuracy",
                  "nats per example"):
        assert words in page
    answers = lines(straight[0], "answers/eval.jsonl")
    wrong = [line for line in answers if line["answer"]["label"] != line["truth"]]
    assert ("The surest errors" in page) == bool(wrong)
    for line in sorted(wrong, key=lambda line: -line["answer"]["confidence"])[:12]:
        assert line["record"]["text"] in page


def test_a_decoder_drops_its_unembedding_and_learns_as_well(folder):
    assert run_here(folder / "decoded", config=str(folder / "decoder_task.py")) == 0
    last = [record for record in lines(folder / "decoded") if "eval/accuracy" in record][-1]
    assert last["eval/accuracy"] > 0.9
    names = read_about(folder / "decoded/checkpoints/24")["checksums"]["params"]
    assert "head/table" not in names and "task_head/table" in names


@pytest.mark.slow
def test_a_mesh_of_eight_devices_has_the_losses_of_one(folder, straight):
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    finish(folder / "meshed", *mesh, config=str(folder / "encoder_task.py"), devices=8)
    np.testing.assert_allclose(losses(folder / "meshed"), losses(straight[0]), rtol=2e-4)


@pytest.mark.slow
def test_learning_rates_by_depth_and_group_are_the_same_on_a_mesh(folder, straight):
    rates = ("optimizer.layer_decay=0.5",
             'optimizer.groups=[{"parameters": "^task_head/", "multiplier": 4.0}]')
    config, mesh = str(folder / "encoder_task.py"), ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    finish(folder / "rates", *rates, config=config)
    assert run_here(folder / "rates_meshed", *rates, *mesh, config=config) == 0
    alone = losses(folder / "rates")
    np.testing.assert_allclose(losses(folder / "rates_meshed"), alone, rtol=2e-4)
    assert not np.allclose(alone[2:], losses(straight[0])[2:], rtol=1e-2)


@pytest.mark.slow
def test_adapters_and_a_head_learn_beside_a_frozen_encoder(folder):
    workdir = folder / "lora"
    lora = ("adapter.kind=lora", "adapter.targets=.", "adapter.dropout=0.1")
    assert run_here(workdir, *lora, config=str(folder / "encoder_task.py")) == 0
    before = (workdir / "metrics.jsonl").read_bytes()
    last = [record for record in lines(workdir) if "eval/accuracy" in record][-1]
    assert last["eval/accuracy"] > 0.8
    about = read_about(workdir / "checkpoints" / "24")
    held = about["checksums"]["params"]
    assert {"task_head/table", "task_head/bias"} < held.keys()
    assert all("/adapter/" in name or name.startswith("task_head/") for name in held)
    assert not any(name.startswith("task_head/") for name in about["base"]["checksums"])
    # It resumes on its base, to the bit.
    shutil.rmtree(workdir / "checkpoints" / "24")
    (workdir / "saved.json").unlink()
    shutil.move(workdir / "timing.jsonl", folder / "moved.jsonl")
    assert run_here(workdir, *lora, config=str(folder / "encoder_task.py")) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert read_about(workdir / "checkpoints" / "24")["checksums"] == about["checksums"]
    lm = lmjax.load(workdir)
    texts = ["lovely a great b", "c awful dull"]
    for one, two in zip(lm.classify(texts), lm.merge().classify(texts), strict=True):
        assert one["label"] == two["label"]
        assert one["confidence"] == pytest.approx(two["confidence"], rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(folder, straight):
    workdir = folder / "killed"
    for step in (3, 8, 14):
        process = start(workdir, config=str(folder / "encoder_task.py"))
        wait_for(process, lambda step=step: len(losses(workdir)) > step)
        process.kill()
        process.wait()
    finish(workdir, config=str(folder / "encoder_task.py"))
    assert_same_run(workdir, straight[0], ["metrics.jsonl", "answers/eval.jsonl"])


@pytest.mark.slow
def test_early_stopping_on_accuracy_keeps_the_best_checkpoint_through_a_kill(folder):
    options = ("eval.metric=accuracy", "eval.patience=2", "checkpoint.keep_best=true",
               "checkpoint.keep_last=1", "train.steps=60")
    config = str(folder / "encoder_task.py")
    finish(folder / "early", *options, config=config)
    steps = checkpoint_steps(folder / "early/checkpoints")
    assert len(steps) == 2 and steps[-1] < 60
    process = start(folder / "early_killed", *options, config=config)
    wait_for(process, lambda: len(losses(folder / "early_killed")) > 9)
    process.kill()
    process.wait()
    finish(folder / "early_killed", *options, config=config)
    assert checkpoint_steps(folder / "early_killed/checkpoints") == steps
    assert_same_run(folder / "early", folder / "early_killed", ["metrics.jsonl"])


def test_the_test_examples_are_answered_by_the_best_weights(folder, tmp_path, capsys):
    """Also by a run that resumes at its end; `train.frozen` and an average are parts of them."""
    examples = folder / "examples.jsonl"
    (folder / "test.jsonl").write_text("".join(examples.read_text().splitlines(True)[:50]))
    config, workdir = folder / "tested.py", tmp_path / "run"
    config.write_text(CONFIG.format(examples=examples, source=folder / "encoder").replace(
        'name="classification"', f"""name="classification", test=[dict(name="t",
        uri="jsonl:{folder / 'test.jsonl'}")]"""))
    # The learning rate rises until the model is worse than before.
    options = ("eval.metric=loss", "checkpoint.keep_best=true", "checkpoint.keep_last=1",
               "eval.every=2", "train.steps=12", "optimizer.peak_lr=0.3",
               "optimizer.warmup_steps=11", "train.frozen=embedding", "optimizer.ema_decay=0.5")
    assert run_here(workdir, *options, config=str(config)) == 0
    found, = (line for line in lines(workdir) if "test_ema/accuracy" in line)
    best = int(found["test_ema/best_step"])
    assert checkpoint_steps(workdir / "checkpoints") == [best, 12] and best < 12
    assert f"the weights of the best step {best}\n" in capsys.readouterr().err
    for ema, group in ((True, "test_ema"), (False, "test")):
        lm, answers = (lmjax.load(workdir, step="best", ema=ema),
                       lines(workdir, f"answers/{group}.jsonl"))
        said = lm.predict([line["record"] for line in answers])
        for one, line in zip(said, answers, strict=True):
            assert one["label"] == line["answer"]["label"]
            assert one["confidence"] == pytest.approx(line["answer"]["confidence"], rel=1e-3)
    page = (workdir / "README.md").read_text()
    assert f"accuracy, test | {found['test_ema/accuracy']:.4f} |" in page
    assert f"step={best})" in page
    before = (workdir / "metrics.jsonl").read_bytes()
    shutil.rmtree(workdir / "checkpoints" / "12")
    for name in ("saved.json", "timing.jsonl"):  # which know of that step
        (workdir / name).unlink()
    assert run_here(workdir, *options, config=str(config)) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_source_may_be_gone_when_a_run_resumes(folder):
    config = folder / "moved_task.py"
    (folder / "encoder").rename(folder / "moved")
    try:
        config.write_text(CONFIG.format(examples=folder / "examples.jsonl",
                                        source=folder / "moved"))
        assert run_here(folder / "resumed", "train.steps=6", "optimizer.schedule=constant",
                        config=str(config)) == 0
    finally:
        (folder / "moved").rename(folder / "encoder")
    assert run_here(folder / "resumed", "train.steps=8", "optimizer.schedule=constant",
                    config=str(config)) == 0


def test_a_source_that_is_not_there_is_one_line(folder, capsys):
    config = folder / "missing_task.py"
    config.write_text(CONFIG.format(examples=folder / "examples.jsonl", source=folder / "nothing"))
    assert run_here(folder / "never", config=str(config)) == 2
    assert "nothing" in one_line(capsys.readouterr().err)
