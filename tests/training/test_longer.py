"""Runs that start from a model with fewer tokens, or with shorter rows."""

import json
import re
import shutil

import numpy as np
import pytest
from processes import one_line, run_here

import lmjax
from lmjax.tree import named_leaves

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: "
                                 "pip install lmjax[hf]")
pytestmark = pytest.mark.long

TEXT, SYNTHETIC = "configs/quickstart.py:tiny", "configs/synthetic.py:tiny"
VOCAB, MORE = 300, ["<tool>", "squares"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(a Hugging Face directory, its tokenizer with more tokens, options of a run on its text)."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(60):
        (folder / f"{i:03}.txt").write_text(f"Document {i} asks for squares of {i * i}.\n" * 20)
    options = ["train.steps=2", "optimizer.warmup_steps=1", "eval.every=0", "sample.every=0",
               "data.heldout_fraction=0.2", f"data.sources.0.uri=text:{folder}/*.txt"]
    assert run_here(folder / "run", *options, f"data.tokenizer.vocab_size={VOCAB}",
                    config=TEXT) == 0
    lmjax.load(folder / "run").export(folder / "hf", log=lambda line: None)
    (folder / "more").mkdir()
    for file in (folder / "hf").glob("*token*"):
        shutil.copy(file, folder / "more")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    assert tokenizer.add_tokens(MORE) == len(MORE)
    tokenizer.save(str(folder / "more" / "tokenizer.json"))
    return folder / "hf", folder / "more", options


@pytest.mark.slow
def test_new_tokens_begin_as_the_mean_of_the_old(source, tmp_path, capsys):
    hf, more, options = source
    own = [*options, f"data.tokenizer.path={more}", f"data.tokenizer.vocab_size={VOCAB + 2}",
           f"train.init_from={hf}", "optimizer.peak_lr=0"]
    assert run_here(tmp_path / "run", *own, config=TEXT) == 0
    told = capsys.readouterr().err
    assert "vocabulary: 2 new tokens; their rows of the embedding and of the head begin as" in told
    lm, old = lmjax.load(tmp_path / "run"), dict(named_leaves(lmjax.load(hf).params))
    assert lm.tokenizer.vocab_size == VOCAB + 2 and lm.tokenizer.encode("squares") == [VOCAB + 1]
    tables = 0
    for path, leaf in named_leaves(lm.params):
        if leaf.shape == old[path].shape:
            np.testing.assert_array_equal(leaf, old[path], err_msg=path)
            continue
        tables += 1
        np.testing.assert_array_equal(leaf[:VOCAB], old[path], err_msg=path)
        mean = np.asarray(old[path]).mean(0)
        np.testing.assert_allclose(leaf[VOCAB:], np.stack([mean] * 2), rtol=1e-4, atol=1e-6)
    assert tables == 1 + ("head/table" in old)


def test_other_tokens_are_no_extension(source, tmp_path, capsys):
    hf, more, options = source
    shutil.copytree(more, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    rules = json.loads(file.read_text())
    names = sorted(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    vocab = {name: i for i, name in enumerate(names)}
    vocab["2"], vocab["6"] = vocab["6"], vocab["2"]  # two tokens change places
    file.write_text(json.dumps(rules | {"model": rules["model"] | {"vocab": vocab}}))
    own = [*options, f"data.tokenizer.path={tmp_path}/other", f"train.init_from={hf}",
           f"data.tokenizer.vocab_size={VOCAB + 2}"]
    capsys.readouterr()
    assert run_here(tmp_path / "run", *own, config=TEXT) == 2
    assert "config.model.vocab_size: expected 300 as" in one_line(capsys.readouterr().err)


def test_rope_changes_only_on_purpose(tmp_path, capsys):
    short = ["train.steps=2", "optimizer.warmup_steps=1", "eval.every=0"]
    assert run_here(tmp_path / "source", *short) == 0
    longer = [*short, f"train.init_from={tmp_path}/source", "model.rope_scaling.kind=linear",
              "model.rope_scaling.factor=2", "data.seq_len=64"]
    capsys.readouterr()
    assert run_here(tmp_path / "run", *longer) == 2
    assert re.search(r"config.model.rope_scaling: expected .*, or set train.change_rope=true",
                     one_line(capsys.readouterr().err))
    assert run_here(tmp_path / "run", *longer, "train.change_rope=true") == 0
    assert lmjax.load(tmp_path / "run").model.config.rope_scaling.factor == 2
