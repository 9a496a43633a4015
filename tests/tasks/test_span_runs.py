"""Runs of tagging and of questions: from a pretrained encoder to figures, on one device and eight.
"""

import json
import random
import re

import numpy as np
import pytest
from processes import assert_same_run, finish, lines, losses, one_line, run_here, start, wait_for

from lmjax.tasks import squad
from lmjax.tasks.entities import entity_scores

pytestmark = pytest.mark.long

TASK = """
def get_config():
    return dict(
        task=dict(name="{task}", {more}),
        data=dict(sources=[dict(name="s", uri="jsonl:{examples}")], seq_len=64,
                  heldout_fraction=0.2),
        optimizer=dict(peak_lr=1e-2, warmup_steps=4),
        train=dict(steps=32, batch_size=8, init_from="{source}"),
        eval=dict(every=16, metric="f1"), checkpoint=dict(every=16))
"""
MODEL = """
def get_config():
    return dict(
        model=dict(family="encoder", num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4,
                   mlp_dim=64, mlp="gelu"),
        data=dict(sources=[dict(name="t", uri="text:{texts}/*.txt")], seq_len=64,
                  tokenizer=dict(vocab_size=299), curate=dict(workers=1)),
        optimizer=dict(warmup_steps=1), train=dict(steps=4, batch_size=8))
"""
NAMES, PLACES, OTHERS = "ann bob eve".split(), "rome oslo lima".split(), "goes sees a the".split()


def tagged(rng):
    words, tags = [], []
    for _ in range(rng.randint(2, 5)):
        several, kind = rng.choice([(NAMES, "PER"), (PLACES, "LOC"), (OTHERS, "")])
        its = rng.sample(several, rng.randint(1, 2))
        words += [*its, "."]
        tags += [f"B-{kind}", *[f"I-{kind}"] * (len(its) - 1), "O"] if kind else [
            *"O" * len(its), "O"]
    return {"words": words, "tags": tags}


def asked(rng):
    where = dict(zip(rng.sample(NAMES, 2), rng.choices(PLACES, k=2), strict=True))
    context = " ".join(f"{name} sees {place} ." for name, place in where.items())
    context = "a the " * rng.choice([0, 0, 30]) + context  # some take several windows
    name = rng.choice(NAMES)
    texts = [where[name]] if name in where else []
    starts = [context.index(f"{name} sees ") + len(name) + 6 for _ in texts]
    return {"question": f"{name} sees ?", "context": context,
            "answers": {"text": texts, "answer_start": starts}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, rng = tmp_path_factory.mktemp("spans"), random.Random(0)
    (made / "texts").mkdir()
    for i in range(30):
        (made / f"texts/{i}.txt").write_text("\n".join(asked(rng)["context"] for _ in range(8)))
    (made / "encoder.py").write_text(MODEL.format(texts=made / "texts"))
    assert run_here(made / "encoder", config=str(made / "encoder.py")) == 0
    for task, make, more in (("tagging", tagged, ""), ("questions", asked, "stride=8")):
        rows = [make(rng) for _ in range(200)]
        path = made / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (made / f"{task}.py").write_text(TASK.format(task=task, more=more, examples=path,
                                                     source=made / "encoder"))
    return made


@pytest.mark.parametrize("task", ["tagging", pytest.param("questions", marks=pytest.mark.slow)])
def test_a_run_learns_and_a_mesh_of_eight_devices_has_its_losses(folder, task):
    config = str(folder / f"{task}.py")
    printed = finish(folder / f"{task}_run", config=config)
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert run_here(folder / f"{task}_mesh", *mesh, config=config) == 0  # on the tests' devices
    run, other = folder / f"{task}_run", folder / f"{task}_mesh"
    # At this rate, rounding differences grow a thousandfold in the steps after these.
    np.testing.assert_allclose(losses(other)[:8], losses(run)[:8], rtol=1e-4)
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    last = [record for record in lines(run) if "eval/f1" in record][-1]
    answers = lines(run, "answers/eval.jsonl")
    held = json.loads((run / "data/manifest.json").read_text())["splits"]["s/heldout"]
    assert len(answers) == held["examples"] and len({line["id"] for line in answers}) == len(
        answers)
    if task == "tagging":
        assert last["eval/accuracy"] > 0.8 and "windows" not in printed
        assert "entities" not in (run / "report.html").read_text()  # it shows the tags alone
        scores = entity_scores([line["answer"]["tags"] for line in answers],
                               [line["truth"] for line in answers])
        assert last["eval/f1"] == pytest.approx(scores["f1"])
        assert last["eval/recall"] == pytest.approx(scores["recall"])
        return
    assert held["windows"] > held["examples"] and "windows" in printed
    exact = np.mean([squad.exact_match(line["answer"]["text"], line["truth"])
                     for line in answers])
    assert last["eval/exact_match"] == pytest.approx(exact)
    for line in answers:
        assert line["truth"] == line["record"]["answers"]["text"]
        if line["answer"]["text"]:
            text = line["record"]["context"][line["answer"]["start"] : line["answer"]["end"]]
            assert text == line["answer"]["text"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tagging", "questions"])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(folder, task):
    config, steps = str(folder / f"{task}.py"), ("eval.every=8", "checkpoint.every=4")
    straight, killed = folder / f"{task}_straight", folder / f"{task}_killed"
    finish(straight, *steps, config=config)
    for step in (6, 14):
        process = start(killed, *steps, config=config)
        wait_for(process, lambda step=step: len(losses(killed)) > step)
        process.kill()
        process.wait()
    finish(killed, *steps, config=config)
    assert_same_run(killed, straight, ["metrics.jsonl", "answers/eval.jsonl"])


def test_bad_records_end_the_run_with_the_first_of_them_in_one_line(folder, capsys):
    rows = [json.loads(line) for line in (folder / "tagging.jsonl").read_text().splitlines()]
    for row in rows[3:60]:
        row["tags"] = row["tags"][1:]
    bad = folder / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    source = json.dumps([{"name": "s", "uri": f"jsonl:{bad}"}])
    assert run_here(folder / "bad", f"data.sources={source}",
                    config=str(folder / "tagging.py")) == 2
    said = one_line(capsys.readouterr().err)
    assert "one per word" in said and re.search(r"bad\.jsonl:\d+: expected a list", said)
