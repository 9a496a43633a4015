"""GRPO: the loss by its formula, rewards and advantages, and a run that learns a format."""

import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import assert_same_run, finish, lines, losses, one_line, run_here, start, wait_for

from lmjax.config import build, plain
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.tasks.grpo import Grpo, advantages, answered_rows
from lmjax.tasks.rewards import REWARDS

CONFIG = DecoderConfig(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, vocab_size=64,
                       init_std=0.3)
LENGTH = 12
FIELDS = {**dict.fromkeys(("tokens", "targets", "loss_mask", "positions", "segment_ids", "values"),
                          LENGTH), "label_values": 1}


def task_of(**options):
    return Grpo(input="{q}", target="{a}", max_tokens=6, **options)


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, vocab_size=0, platform="cpu", dtype=jnp.float32)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(1))


def answered(seed=0, rows=6):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 64, 1 + i % 3).tolist() for i in range(rows)]
    answers = [rng.integers(3, 64, 1 + i % 5).tolist() for i in range(rows)]
    gains = rng.normal(size=rows).astype(np.float32)
    return answered_rows(FIELDS, prompts, answers, gains, np.abs(gains)), answers, gains


@pytest.mark.long
@pytest.mark.parametrize("kind, temperature", [
    ("grpo", 0.6), pytest.param("grpo", 1.0, marks=pytest.mark.slow),
    pytest.param("dapo", 1.0, marks=pytest.mark.slow), ("dr_grpo", 1.0)])
def test_loss_and_gradient_are_those_of_the_formula(kind, temperature, model, params):
    batch, answers, gains = answered()
    loss_fn = task_of(kind=kind, temperature=temperature).loss(model, {}, chunk=4)

    def ours(params):
        loss = loss_fn(params, batch, None)
        return loss.total / loss.weight

    def by_formula(params):  # -mean of advantage * ratio, the ratio of likelihoods being 1
        log_p = jax.nn.log_softmax(model.logits(params, batch) / temperature)
        own = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        ratio = jnp.exp(own - jax.lax.stop_gradient(own))
        terms = [jnp.where(mask > 0, gain * r, 0.0).sum()
                 for mask, gain, r in zip(batch["loss_mask"], gains, ratio, strict=True)]
        lengths = [len(answer) for answer in answers]
        if kind == "dapo":
            return -sum(terms) / sum(lengths)
        over = [6] * len(lengths) if kind == "dr_grpo" else lengths
        return -sum(term / n for term, n in zip(terms, over, strict=True)) / len(terms)

    (a, da), (b, db) = (jax.value_and_grad(f)(params) for f in (ours, by_formula))
    assert float(a) == pytest.approx(float(b), abs=1e-6)
    for x, y in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(jnp.abs(y).max())))
    reward = loss_fn(params, batch, None).extra["reward"]
    assert float(reward) == pytest.approx(np.abs(gains).sum(), rel=1e-5)


def test_advantages_are_relative_to_the_group():
    rewards = np.array([[1.0, 0, 0, 1], [2, 2, 2, 2]])
    found = advantages(rewards, "grpo")
    spread = np.std(rewards[0], ddof=1)
    np.testing.assert_allclose(found[0], (rewards[0] - 0.5) / (spread + 1e-4), rtol=1e-6)
    assert not found[1].any()
    np.testing.assert_allclose(advantages(rewards, "dr_grpo")[0], rewards[0] - 0.5)


def test_rows_hold_prompts_and_answers_and_count_the_answers_only():
    batch, answers, gains = answered()
    for i, answer in enumerate(answers):
        counts = batch["loss_mask"][i] > 0
        assert batch["targets"][i][counts].tolist() == answer
        assert (batch["values"][i][counts] == gains[i]).all()
        assert not batch["values"][i][~counts].any()
        n = int(batch["segment_ids"][i].sum())
        assert n == (1 + i % 3) + len(answer) - 1


@pytest.mark.parametrize("name, answer, target, expected", [
    ("exact_match", " 12\n", "12", 1), ("exact_match", "12.", "12", 0),
    ("number", "it is 3 + 4 = 7.", "7.0", 1), ("number", "-7", "7", 0), ("number", "", "7", 0),
    ("pattern", "abab", "", 1), ("pattern", "abc", "", 0)])
def test_rewards(name, answer, target, expected):
    assert REWARDS[name](answer, target, "(ab)+") == expected


def test_a_recipe_brings_a_reward_of_its_own_and_a_checkpoint_loads_without_it(monkeypatch):
    made = task_of(rewards={"short": 2.0, "exact_match": 1.0})
    with pytest.raises(UserError, match="rewards: expected one of exact_match, .*got 'short'"):
        made.check_installed()
    assert build(Grpo, plain(made)) == made  # as it is read from a checkpoint
    monkeypatch.setitem(REWARDS, "short", lambda answer, target, pattern: float(len(answer) < 3))
    made.check_installed()
    assert (made.reward("ab", "ab"), made.reward("abc", "abc")) == (3.0, 1.0)


BASE = """
def get_config():
    return dict(
        model=dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4, mlp_dim=64),
        data=dict(sources=[dict(name="t", uri="text:{texts}/*.txt")], seq_len=32,
                  tokenizer=dict(vocab_size=288), curate=dict(workers=1)),
        optimizer=dict(peak_lr=1e-2, warmup_steps=5), train=dict(steps=30, batch_size=8))
"""
TASK = """
def get_config():
    return dict(
        task=dict(name="grpo", input="{{q}}", target="{{a}}", group=4, max_tokens=4,
                  rewards={{"pattern": 1.0}}, pattern="(red|blue).*", eval_examples=8),
        data=dict(sources=[dict(name="s", uri="jsonl:{examples}")], seq_len=16,
                  heldout_fraction=0.2),
        optimizer=dict(peak_lr=5e-3, warmup_steps=2, schedule="constant"),
        train=dict(steps=12, batch_size=16, init_from="{source}"),
        eval=dict(every=12), checkpoint=dict(every=4, keep_last=9))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, rng = tmp_path_factory.mktemp("grpo"), random.Random(0)
    words = "red blue green one two three".split()
    (made / "texts").mkdir()
    for i in range(40):
        lines_of_text = "\n".join(f"{rng.choice(words)}\n{rng.choice(words)}" for _ in range(20))
        (made / f"texts/{i}.txt").write_text(lines_of_text)
    rows = [{"q": rng.choice(words), "a": "red", "n": i} for i in range(120)]
    (made / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "base.py").write_text(BASE.format(texts=made / "texts"))
    assert run_here(made / "base", config=str(made / "base.py")) == 0
    (made / "task.py").write_text(TASK.format(examples=made / "examples.jsonl",
                                              source=made / "base"))
    return made


@pytest.fixture(scope="module")
def straight(folder):
    finish(folder / "straight", "train.steps=40", "eval.every=40", config=str(folder / "task.py"))
    return folder / "straight"


@pytest.mark.slow
def test_a_run_learns_what_earns_a_reward(straight):
    rewards = [line["reward"] for line in lines(straight) if "reward" in line]
    assert np.mean(rewards[-8:]) > np.mean(rewards[:4]) + 0.15
    answers = lines(straight, "answers/eval.jsonl")
    assert len(answers) == 8
    assert np.mean([bool(re.fullmatch("(red|blue).*", line["answer"]["text"], re.DOTALL))
                    for line in answers]) > 0.5


@pytest.mark.slow
def test_killed_it_writes_the_same_answers_again(folder, straight):
    options = ("train.steps=40", "eval.every=40")
    process = start(folder / "killed", *options, config=str(folder / "task.py"))
    wait_for(process, lambda: len(losses(folder / "killed")) > 5)
    process.kill()
    process.wait()
    finish(folder / "killed", *options, config=str(folder / "task.py"))
    assert_same_run(folder / "killed", straight, ["metrics.jsonl", "answers/eval.jsonl"])


@pytest.mark.slow
def test_a_mesh_of_eight_devices_writes_and_learns_what_one_does(folder, straight):
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert run_here(folder / "meshed", "train.steps=40", "eval.every=40", *mesh,
                    config=str(folder / "task.py")) == 0
    for name in ("grad_norm", "reward"):  # as long as rounding changes none of the answers
        here, there = ([line[name] for line in lines(run) if name in line]
                       for run in (folder / "meshed", straight))
        np.testing.assert_allclose(here[:8], there[:8], rtol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("options, message", [
    (["task.max_tokens=16"], "less than data.seq_len=16"),
    (["task.kind=dapo", "train.microbatches=2"], "compares all rows")])
def test_settings_that_do_not_go_together_are_one_line(options, message, folder, capsys):
    assert run_here(folder / "never", *options, config=str(folder / "task.py")) == 2
    assert message in one_line(capsys.readouterr().err)


@pytest.mark.long
def test_long_answers_fit_into_short_rows(folder):
    assert run_here(folder / "long", "task.max_tokens=14", "train.steps=2", "eval.every=2",
                    "optimizer.warmup_steps=1", config=str(folder / "task.py")) == 0


@pytest.mark.long
def test_groups_that_do_not_fill_a_batch_are_one_line(folder, capsys):
    assert run_here(folder / "odd", "train.batch_size=18", config=str(folder / "task.py")) == 2
    assert "a multiple of task.group=4" in one_line(capsys.readouterr().err)
