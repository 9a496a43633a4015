"""Hugging Face directories that are refused: one line, exit code 2, and nothing is left."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from exports import CONFIG, settings_of, write

import lmjax
from lmjax.cli.main import main
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.errors import UserError
from lmjax.runtime.files import new_directory


def edit(folder, **changes):
    settings = settings_of(folder) | changes
    settings = {name: value for name, value in settings.items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(settings))


def retensor(folder, change):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
# case -> (what spoils the directory, the message)
BAD = {
    "truncated": (truncate, "expected a whole safetensors file, got one of"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"x"),
                "expected a whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(),
                   "expected the weights in model.safetensors"),
    "missing": (lambda f: retensor(f, lambda t: t.pop(NORM)),
                rf"expected tensor {NORM} \[16\], got none"),
    "extra": (lambda f: retensor(f, lambda t: t.update(odd=t[NORM])),
              "expected only tensors .* got odd as well"),
    "shape": (lambda f: retensor(f, lambda t: t.update({EMBED: t[EMBED][:-1].copy()})),
              rf"expected tensor {EMBED} \[64, 16\], got \[63, 16\]"),
    "dtype": (lambda f: retensor(f, lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
              "in F32, .* got I8"),
    "model_type": (lambda f: edit(f, model_type="mamba"),
                   "expected model_type to be one of llama, .* got 'mamba'"),
    "code": (lambda f: edit(f, auto_map={"AutoModel": "modeling.Evil"}),
             "expected a model that needs no code of its"),
    "switch": (lambda f: edit(f, is_causal=False), "expected is_causal=True, got False"),
    "unknown": (lambda f: edit(f, quantization_config={"bits": 4}),
                "expected compressed-tensors, mxfp4 or fp8, got {'bits': 4}"),
    "activation": (lambda f: edit(f, hidden_act="tanh"),
                   "expected hidden_act to be one of 'silu'.* got 'tanh'"),
    "rope": (lambda f: edit(f, rope_scaling={"rope_type": "longrope", "factor": 2}),
             "expected rope_type to be one of .* got 'longrope'"),
    "no size": (lambda f: edit(f, hidden_size="gone"),
                rf"expected tensor {EMBED} \[64, 4096\], got \[64, 16\]"),
    "bad size": (lambda f: edit(f, hidden_size="wide"),
                 "embed_dim: expected an integer, got 'wide'"),
    "tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(train_tokenizer(
        TokenizerConfig(vocab_size=300), ["ab abc abcd é 日本 stop here\n"] * 50).to_bytes()),
                  "expected a tokenizer for an embedding of 64 rows, got one of 300 tokens"),
    "bad tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"x"),
                      "tokenizer.model: expected a SentencePiece model, got 1 bytes"),
    "tied, no table": (lambda f: (edit(f, tie_word_embeddings=True),
                                  retensor(f, lambda t: (t.pop(EMBED), t.pop("lm_head.weight")))),
                       rf"expected tensor {EMBED} \[64, 16\], got none"),
    "no index": (lambda f: (f / "model.safetensors").rename(
        f / "model.safetensors.index.json").write_text('{"weight_map": []}'),
                 r"expected weight_map to name each tensor's file, got \[\]"),
    "no text": (lambda f: (f / "tokenizer.json").write_bytes(b'{"\xff": 0}'),
                "expected tokenizer.json .*in UTF-8, got"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "expected JSON, got"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "out"
    write(folder)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, good, tmp_path, capsys):
    spoil, message = BAD[case]
    shutil.copytree(good, tmp_path / "hf")
    spoil(tmp_path / "hf")
    assert main(["import-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(message, printed), printed
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.long
def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk, tmp_path, capsys):
    write(tmp_path / "hf", replace(CONFIG, vocab_size=20_000))
    for command in ("import-hf", "export-hf"):
        capsys.readouterr()
        assert main([command, str(tmp_path / "hf"), "--out", str(small_disk / "out")]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert re.search("expected .* MB.*, got.*; make room", line), line
        assert not list(small_disk.iterdir())


def test_nothing_is_overwritten(good, tmp_path):
    (tmp_path / "there").mkdir()
    for command in ("import-hf", "export-hf"):
        assert main([command, str(good), "--out", str(tmp_path / "there")]) == 2
    assert not list((tmp_path / "there").iterdir())


def test_two_processes_cannot_write_one_directory(good, tmp_path, capsys):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "left by a process that was killed").write_text("")
    with new_directory(tmp_path / "out") as part:
        (part / "first").write_text("")
        assert main(["export-hf", str(good), "--out", str(tmp_path / "out")]) == 1
        [line] = capsys.readouterr().err.splitlines()
        message = r"/out: expected nobody else at work there, got another process .*; wait"
        assert re.search(message, line)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/first"]


def test_an_index_with_other_files_is_refused(tmp_path):
    write(tmp_path / "out", max_shard_bytes=2000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for change, message in ((lambda m: m.update({NORM: "../x.safetensors"}), "path out of it"),
                            (lambda m: m.pop(NORM), f"another list .first: {NORM}.")):
        bad = json.loads(json.dumps(good))
        change(bad["weight_map"])
        index.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            lmjax.load(tmp_path / "out")
