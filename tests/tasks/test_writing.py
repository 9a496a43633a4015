"""Runs whose answers are texts: on any mesh, killed, answered by the trained model, exported."""

import io
import json
import random

import numpy as np
import pytest
from processes import assert_same_run, finish, lines, losses, run_here, start, wait_for

import lmjax
from lmjax.cli import main as cli
from lmjax.data.chat import BUILT_IN, FILE

pytestmark = pytest.mark.long
pytest.importorskip("jinja2")

PRETRAINED = """
def get_config():
    return dict(
        model=dict(family="{family}", num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4,
                   mlp_dim=64),
        data=dict(sources=[dict(name="t", uri="text:{folder}/*.txt")], seq_len=32,
                  tokenizer=dict(vocab_size={size}), curate=dict(workers=1), heldout_fraction=0.2),
        optimizer=dict(warmup_steps=1), train=dict(steps=4, batch_size=8))
"""
TASK = """
def get_config():
    return dict(
        task=dict({task}, metric="exact_match", max_tokens=8, eval_examples=12,
                  test=[dict(name="t", uri="jsonl:{folder}/test.jsonl")]),
        data=dict(sources=[dict(name="s", uri="jsonl:{folder}/examples.jsonl")], seq_len=64,
                  heldout_fraction=0.2),
        optimizer=dict(peak_lr={rate}, warmup_steps=4),
        train=dict(steps={steps}, batch_size=8, init_from="{folder}/{family}"),
        eval=dict(every={every}), checkpoint=dict(every={every}, keep_last=9))
"""
PAIRS = "name='pairs', input='next {q}', target='{a}', target_len=16"
CHAT = "name='chat', template='plain', turns='all'"
LETTERS = "abcdefgh"


def following(letter):
    return LETTERS[(LETTERS.index(letter) + 1) % 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Examples, texts, and a pretrained model of each family."""
    made, rng = tmp_path_factory.mktemp("writing"), random.Random(0)
    rows = []
    for _ in range(200):
        asked = rng.choices(LETTERS, k=2)
        talk = [message for letter in asked for message in (
            {"role": "user", "content": letter},
            {"role": "assistant", "content": following(letter)})]
        rows.append({"q": asked[0], "a": following(asked[0]), "messages": talk})
    (made / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:17]))
    for i in range(40):
        text = "\n".join(f"next {a} {following(a)}" for a in rng.choices(LETTERS, k=10))
        (made / f"{i}.txt").write_text(text)
    tasks = {"pairs": ("encdec", PAIRS, 16), "lines": ("decoder", PAIRS, 16),
             "chat": ("decoder", CHAT, 400)}
    for family in ("encdec", "decoder"):
        config = made / f"{family}.py"
        config.write_text(PRETRAINED.format(
            family=family, folder=made, size=280))
        assert run_here(made / family, config=str(config)) == 0
    for name, (family, task, steps) in tasks.items():
        rate, every = (3e-3, 400) if name == "chat" else (1e-2, 8)
        (made / f"{name}_task.py").write_text(TASK.format(
            task=task, folder=made, steps=steps, family=family, rate=rate, every=every))
    return made


@pytest.fixture(scope="module")
def trained(folder):
    """(name of a task) -> the directory of its run, made once."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = folder / f"run_{name}"
            assert run_here(done[name], config=str(folder / f"{name}_task.py")) == 0
        return done[name]

    return run


@pytest.mark.parametrize("name", [pytest.param("pairs", marks=pytest.mark.slow), "lines"])
def test_answers_are_those_of_the_trained_model(name, trained):
    workdir = trained(name)
    answers = lines(workdir, "answers/eval.jsonl")
    lm = lmjax.load(workdir)
    after = "" if name == "pairs" else "\n"
    texts = lm.generate([f"next {line['record']['q']}{after}" for line in answers],
                        temperature=0, max_tokens=8)
    assert [line["answer"]["text"] for line in answers] == [text.strip() for text in texts]
    assert all(line["truth"] == line["record"]["a"] for line in answers) and len(answers) == 12
    right = np.mean([line["answer"]["text"] == line["truth"] for line in answers])
    last = [record for record in lines(workdir) if "eval/exact_match" in record][-1]
    assert last["eval/exact_match"] == right and last["eval/answered"] == 12
    assert last["eval/examples"] > 12
    tested, = (record for record in lines(workdir) if "test/answered" in record)
    assert tested["test/answered"] == len(lines(workdir, "answers/test.jsonl")) == 17


@pytest.mark.slow
def test_beams_answer_as_the_trained_model_does(folder, trained):
    workdir = folder / "beams"
    assert run_here(workdir, "task.num_beams=3", config=str(folder / "pairs_task.py")) == 0
    answers = lines(workdir, "answers/eval.jsonl")
    texts = lmjax.load(workdir).generate([f"next {line['record']['q']}" for line in answers],
                                         temperature=0, max_tokens=8, num_beams=3)
    assert [line["answer"]["text"] for line in answers] == [text.strip() for text in texts]
    np.testing.assert_array_equal(losses(workdir), losses(trained("pairs")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "chat"])
def test_a_mesh_of_eight_devices_has_the_losses_and_answers_of_one(name, folder):
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    workdir = folder / f"mesh_{name}"
    steps = ("train.steps=16", "eval.every=16", "checkpoint.every=16")
    finish(workdir, *mesh, *steps, config=str(folder / f"{name}_task.py"), devices=8)
    alone = folder / f"alone_{name}"
    assert run_here(alone, *steps, config=str(folder / f"{name}_task.py")) == 0
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=2e-4)
    here, there = (lines(run, "answers/eval.jsonl") for run in (workdir, alone))
    assert [line["id"] for line in here] == [line["id"] for line in there]
    same = [a["answer"] == b["answer"] for a, b in zip(here, there, strict=True)]
    assert np.mean(same) > 0.9  # two letters may be equally likely up to rounding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "chat"])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(name, folder):
    config, steps = str(folder / f"{name}_task.py"), ("train.steps=16", "eval.every=8",
                                                      "checkpoint.every=4")
    straight, killed = folder / f"{name}_straight", folder / f"{name}_killed"
    finish(straight, *steps, config=config)
    for step in (3, 9):
        process = start(killed, *steps, config=config)
        wait_for(process, lambda step=step: len(losses(killed)) > step)
        process.kill()
        process.wait()
    finish(killed, *steps, config=config)
    assert_same_run(killed, straight, ["metrics.jsonl", "answers/eval.jsonl",
                                       "answers/test.jsonl"])


@pytest.mark.slow
def test_a_decoder_answers_in_conversations(trained):
    lm = lmjax.load(trained("chat"))
    answers = lines(trained("chat"), "answers/eval.jsonl")
    said = [lm.chat(line["record"]["messages"][:-1], temperature=0, max_tokens=8)
            for line in answers]
    assert said == [line["answer"]["text"] for line in answers]
    right = [line["answer"]["text"] == line["truth"] for line in answers]
    assert np.mean(right) > 0.6  # one of eight by chance
    pieces = []
    talk = answers[0]["record"]["messages"][:1]
    whole = lm.chat(talk, temperature=0, max_tokens=8, stream=lambda row, text: pieces.append(text))
    assert "".join(pieces).strip() == whole


def test_the_template_goes_into_checkpoints_and_exports(trained, tmp_path):
    lm = lmjax.load(trained("chat"))
    lm.export(tmp_path / "hf", log=lambda line: None)
    assert (tmp_path / "hf" / FILE).read_text() == BUILT_IN["plain"]
    assert (tmp_path / "hf/tokenizer.json").exists()
    talk = [{"role": "user", "content": "c"}]
    assert lmjax.load(tmp_path / "hf").chat(talk, temperature=0, max_tokens=8) == lm.chat(
        talk, temperature=0, max_tokens=8)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == lm.speaker.template.render(talk, prompt=True)


def test_the_terminal_keeps_the_history_until_it_is_reset(trained, monkeypatch, capsys):
    lm = lmjax.load(trained("chat"))
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nc\n/what\n\n/reset\nc\n/quit\nd\n"))
    assert cli.main(["chat", str(trained("chat")), "--temperature", "0", "--max-tokens", "8"]) == 0
    printed = capsys.readouterr()
    history = [{"role": "user", "content": "a"}]
    first = lm.chat(history, temperature=0, max_tokens=8)
    history += [{"role": "assistant", "content": first}, {"role": "user", "content": "c"}]
    second = lm.chat(history, temperature=0, max_tokens=8)
    third = lm.chat(history[-1:], temperature=0, max_tokens=8)
    assert printed.out.split() == [first, second, third]
    assert "/what" in printed.err


def test_a_model_that_was_not_taught_to_chat_says_so(folder, capsys):
    assert cli.main(["chat", str(folder / "decoder")]) == 2
    assert "task.name=chat" in capsys.readouterr().err
