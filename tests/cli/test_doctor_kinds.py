"""What people's paths hold, kind by kind: the doctor has a line for each of them.

`CASES` is the table. Each case makes its own files, and says which line is expected.
"""

import bz2
import gzip
import hashlib
import json
import os
import pathlib
import re
import shutil
import struct
import tarfile
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
from config_values import BASES
from hub_models import cache, edit, other, rename

from lmjax.cli.doctor.diagnosis import BAD, GOOD, NOTE
from lmjax.cli.doctor.kinds import diagnose
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.settings import read_settings
from lmjax.huggingface.stored import rows_for
from lmjax.huggingface.weights import tensor_shapes
from lmjax.models.model import build_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZE = 288  # rows of the tables; 8 more than the tokenizer has tokens
WEIGHTS = "model.safetensors"
TEXTS = [f"The cat {i} sat on the mat.\nA dog ran." for i in range(12)]
ROW = {"text": "A text that is long enough."}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory of each kind of model with one tokenizer, and a run with its data and corpus."""
    hub_tokenizers = pytest.importorskip("hub_tokenizers")
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install lmjax[hf]")
    folder = tmp_path_factory.mktemp("kinds")
    for name in ("llama", "gpt2", "bert", "t5"):
        write(folder / name, BASES[name] | {
            "model_type": name, "vocab_size": SIZE, "bos_token_id": 0, "eos_token_id": 1})
        hub_tokenizers.byte_level(folder / name)
    with tarfile.open(ROOT / "tests/fixtures/version_0.1.0.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    saved = {"directory": "run/checkpoints", "step": 5, "evaluated": 5}
    (folder / "run/saved.json").write_text(json.dumps(saved))
    return folder


def write(path, settings):
    """A directory of random weights."""
    from safetensors.numpy import save_file

    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    known, rng = MODEL_TYPES[settings["model_type"]], np.random.default_rng(0)
    ours = read_settings(settings, "config.json")
    shapes = build_model(ours, vocab_size=0, platform="cpu", dtype=jnp.float32).shapes
    save_file({name: rng.standard_normal(shape, np.float32) for name, shape in tensor_shapes(
        shapes, rows_for(known, ours)).items()}, path / WEIGHTS)


def of(name, *changes):
    """A copy of one of the directories of `made`, changed."""
    def make(made, folder):
        path = shutil.copytree(made / name, folder / name)
        for change in changes:
            path = change(path) or path
        return path
    return make


def tell(file, **keys):
    """Sets keys of a JSON file; those of value Ellipsis are taken out."""
    def change(path):
        told = json.loads((path / file).read_text()) if (path / file).exists() else {}
        told = {key: value for key, value in (told | keys).items() if value is not ...}
        (path / file).write_text(json.dumps(told))
    return change


def config(**keys):
    return tell("config.json", **keys)


def put(name, content=b"", **keys):
    """Writes a file: bytes, text, or keys as JSON."""
    def change(path):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        raw = json.dumps(keys) if keys else content
        file.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return change


def weights(change):
    return lambda path: edit(path, change)


def to(name):
    return lambda path: path / name


def untied(path):
    edit(path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] * 2}))


def corpus(name, content, look=None):
    """One file of a corpus; `look` is the source that the doctor is asked about."""
    def make(made, folder):
        put(name, content)(folder)
        return look.format(folder) if look else folder / name
    return make


def parquet(column, text=None, look="parquet:{}/x.parquet"):
    def make(made, folder):
        import pyarrow.parquet

        table = pyarrow.table({text or "text": column()})
        pyarrow.parquet.write_table(table, folder / "x.parquet")
        return look.format(folder)
    return make


def large(kind):
    import pyarrow

    value = pyarrow.array([ROW["text"]] * 3, pyarrow.large_string())
    return value if kind == "large" else value.dictionary_encode() if kind == "dictionary" else (
        pyarrow.array([[ROW["text"]]] * 3))


def saved(**keys):
    return tell("saved.json", **keys)


def about(**keys):
    """Changes what the checkpoint of a run says of itself."""
    def change(path):
        file = path / "checkpoints/5/about/metadata"
        told = json.loads(file.read_text()) | keys
        told.pop("sha256")
        told["sha256"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps(told))
    return change


def killed(path):
    shutil.copytree(path / "checkpoints/5", path / "checkpoints/7")
    (path / "checkpoints/7/commit_success.txt").unlink()


def flip(pattern):
    """Flips a bit of the largest file."""
    def change(path):
        file = max((f for f in path.glob(pattern) if f.is_file()), key=lambda f: f.stat().st_size)
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    return change


def at(path):
    """A path as someone writes it; {} is a directory of the case."""
    return lambda made, folder: path.format(folder)


def sentencepiece(path):
    model = train_tokenizer(TokenizerConfig(vocab_size=SIZE), TEXTS)
    (path / "tokenizer.model").write_bytes(model.to_bytes())


def more_tokens(path):
    import tokenizers

    file = str(path / "tokenizer.json")
    model = tokenizers.Tokenizer.from_file(file)
    model.add_special_tokens([f"<extra {i}>" for i in range(9)])
    model.save(file)


LINES = "".join(json.dumps(ROW | {"n": i}) + "\n" for i in range(3))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FULL = {"full_attention": {"rope_type": "default", "rope_theta": 9.0}}
# number and name of a case -> (what makes it, the level of a line, a part of the line)
CASES = {
    "1 settings that nobody reads": (
        of("llama", config(unsloth_fixed=True)), NOTE, "config: passes over unsloth_fixed"),
    "1 two thetas": (of("llama", config(rope_theta=5.0, rope_parameters={"rope_theta": 9.0})),
                     NOTE, "config: rope_theta=9.0 decides over 5.0 elsewhere, as in transformers"),
    "1 RoPE by kinds of layer": (of("llama", config(rope_parameters=FULL)), BAD, "files: "),
    "1 YaRN beside another": (
        of("llama", config(rope_scaling=YARN, rope_parameters={"rope_theta": 9.0})), BAD, "got"),
    "1 two activations": (of("t5", config(is_gated_act=True)), BAD, "is_gated_act"),
    "2 a head that differs": (of("gpt2", untied), NOTE, "weights: the head differs from the emb"),
    "2 a decoder that differs": (of("bert", weights(other(
        "cls.predictions.bias", "cls.predictions.decoder.bias"))), BAD, "with which it is one"),
    "2 halves that differ": (of("t5", weights(other(
        "shared.weight", "encoder.embed_tokens.weight"))), BAD, "with which it is one tensor"),
    "2 one of two that is the same": (of("t5", weights(lambda t: t.update(
        {"encoder.embed_tokens.weight": t["shared.weight"]}))), GOOD, "files: "),
    "3 an older index": (of("llama", put(f"{WEIGHTS}.index.json", weight_map={})), NOTE,
                         "weights: it is read, and model.safetensors.index.json beside it is not"),
    "3 another format": (of("llama", put("pytorch_model.bin", b"\x80")), NOTE,
                         "weights that are not read: pytorch_model.bin"),
    "3 two tokenizers": (of("llama", sentencepiece), GOOD, "tokenizer.model beside it is not read"),
    "3 tokens of other files": (of("llama", put("added_tokens.json", **{"<new>": 280})), GOOD,
                                "1 are added or changed by other files"),
    "3 shards without an index": (of("llama", lambda p: (p / WEIGHTS).rename(
        p / "model-00001-of-00002.safetensors") and None), BAD, "safetensors.index.json"),
    "4 several ends": (of("llama", put("generation_config.json", eos_token_id=[1, 2])), GOOD,
                       "an answer ends with </s> or .2."),
    "4 no end": (of("llama", put("generation_config.json", eos_token_id=None)), GOOD,
                 "an answer ends with its length alone"),
    "4 tokens that are banned": (of("llama", put("generation_config.json", suppress_tokens=[7])),
                                 GOOD, "1 ids are never drawn"),
    "4 what is not followed": (
        of("llama", put("generation_config.json", no_repeat_ngram_size=3)), NOTE,
        "answers: none are written: .*no_repeat_ngram_size"),
    "5 learned positions": (of("gpt2"), GOOD, "ids below 288, rows of at most 48"),
    "5 positions without an end": (of("llama"), GOOD, "ids below 288, rows of any length"),
    "5 a run": (of("run"), GOOD, "input: ids below"),
    "6 read as trained": (of("run"), GOOD, "text: read as <s>, the text; an answer ends with </s>"),
    "6 the tokenizer's own mask": (of("bert"), NOTE, "ids of masked_lm: 1 of the tokenizer's own"),
    "6 sentinels without rows": (of("t5"), NOTE, "training: ids of .*free rows for"),
    "6 the start of an answer": (of("t5"), GOOD, "an answer begins with <s> and ends with </s>"),
    "7 an array": (corpus("a.jsonl", json.dumps([ROW, ROW])), GOOD, "2 record.s. looked at, 0"),
    "7 an odd suffix": (corpus("a.data", gzip.compress(LINES.encode())), GOOD, "3 record.s. look"),
    "7 a pointer": (corpus("a.jsonl", POINTER), BAD, "content: "),
    "7 a web page": (corpus("a.jsonl", "<!DOCTYPE html><html>"), BAD, "a web page"),
    "7 a file that broke off": (
        corpus("a.jsonl.gz", gzip.compress(LINES.encode())[:-9]), BAD, "content: "),
    "8 nothing": (at("None"), BAD, "leave it empty if there is none, or write ./None"),
    "8 a list": (at('["a", "b"]'), BAD, "path: "),
    "8 two paths": (lambda made, folder: f"{made}/run,{made}/data", BAD, "these are 2 paths"),
    "8 prompts": (of("run", lambda p: tell("config.json", sample=json.loads(
        (p / "config.json").read_text())["sample"] | {"prompts": ["Once, there", "x"]})(p)),
        GOOD, "prompts: 2 to sample from: 'Once, there', 'x'"),
    "9 gamma and beta": (of("bert", weights(rename("LayerNorm.weight", "LayerNorm.gamma"))), NOTE,
                         "read under other names, such as .*gamma as .*weight"),
    "9 names of torch.compile": (of("llama", weights(rename("", "_orig_mod."))), NOTE,
                                 "under other names, such as _orig_mod"),
    "9 buffers": (of("llama", weights(lambda t: t.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}))), NOTE,
        "1 are buffers, which are made anew"),
    "9 a hub's cache": (of("llama", lambda p: cache(p.parent, p)), GOOD, "files: "),
    "9 the file itself": (of("llama", to(WEIGHTS)), GOOD, "files: "),
    "9 GGUF": (of("llama", put("x.gguf", b"GGUF" + struct.pack("<I", 3)), to("x.gguf")), BAD,
               "lmjax import-gguf FILE"),
    "9 code of its own": (of("llama", config(auto_map={"AutoModel": "x.X"})), BAD, "auto_map"),
    "10 more tokens than rows": (of("llama", more_tokens), GOOD,
                                 "ids from 288 on have no row in the model and do not exist"),
    "10 more rows than tokens": (of("llama"), NOTE, "model's rows have no token"),
    "10 what is lost": (of("llama", lambda p: tell("tokenizer.json", normalizer={
        "type": "Lowercase"})(p)), NOTE, "loses part of some texts: 'The Quick Brown Fox'"),
    "10 of another model": (of("llama", config(vocab_size=2000)), BAD, "files: "),
    "11 a template in a file": (of("llama", put("chat_template.jinja", "{{ messages }}")), GOOD,
                                "chat: its files have a chat template"),
    "11 a template in the config": (of("llama", tell(
        "tokenizer_config.json", chat_template="{{ messages }}")), GOOD, "chat: its files have"),
    "11 a template that fails": (of("llama", put("chat_template.jinja", "{{ x.y.z }}")), NOTE,
                                 "chat: the template does not take"),
    "11 the other files": (of("llama", put("special_tokens_map.json", "{}")), GOOD,
                           "kept with it: special_tokens_map.json, tokenizer_config.json"),
    "12 large strings": (parquet(lambda: large("large")), GOOD, "files: 1 of parquet"),
    "12 a dictionary": (parquet(lambda: large("dictionary")), GOOD, "files: 1 of parquet"),
    "12 another column": (parquet(lambda: large("large"), "body"), BAD, "body"),
    "12 CSV": (corpus("a.csv", "text,n\nA text,1\n", "csv:{}/a.csv"), GOOD, "1 of csv"),
    "12 compressed with bzip2": (corpus("a.jsonl.bz2", bz2.compress(LINES.encode())), GOOD,
                                 "3 record.s. looked at, 0 without"),
    "12 UTF-16": (corpus("a.txt", "A text".encode("utf-16")), GOOD, "1 record.s. looked at, 0"),
    "13 a variable that is not set": (at("$LMJAX_NOT_SET/x"), BAD, "a value of the variable"),
    "13 S3": (at("s3://bucket/run"), BAD, "a local path or gs://BUCKET/DIR"),
    "13 a file by its address": (
        lambda made, folder: f"file://{made}/llama", GOOD, "files: 30 tensors"),
    "13 a link": (of("run", lambda p: (p.parent / "link").symlink_to(p) or p.parent / "link"),
                  GOOD, "config: complete"),
    "13 a link to nothing": (lambda made, folder: (folder / "l").symlink_to("x") or folder / "l",
                             BAD, "path: it leads to x, which is not there"),
    "14 checkpoints that are gone": (
        of("run", lambda p: shutil.rmtree(p / "checkpoints")), BAD, "saved.json: "),
    "14 a newer one that is gone": (of("run", saved(step=8)), BAD, "saved.json: .*step 8"),
    "14 a save that was killed": (of("run", killed), NOTE, "7 was not saved to its end"),
    "15 an evaluation that failed": (of("run", saved(evaluated=0), about(unfinished=True)), GOOD,
                                     "its evaluation did not end, and the next start does it ag"),
    "15 a damaged shard": (of("data", flip("docs/train/tokens/**/*")), BAD, "expected the array"),
    "15 a damaged checkpoint": (of("run", flip("checkpoints/5/params/**/*")), BAD, "step 5: "),
    "16 a run that is read-only": (of("run", lambda p: p.rename(p.parent / "read-only")), NOTE,
                                   "place: the run can be read and cannot go on"),
    "16 an empty directory": (lambda made, folder: (folder / "read-only").mkdir() or (
        folder / "read-only"), BAD, "a directory that can be written"),
    "16 nothing there": (at("{}/gone/x"), BAD, "the last part that exists is"),
    "17 what logits cost": (of("llama"), GOOD, "memory: .* KiB per position with logits"),
    "18 what a model holds": (of("bert"), GOOD, "memory: .* of parameters in float32"),
    "18 what a run holds": (of("run"), GOOD, "memory: .* of parameters in float32"),
}
WHOLE = ("15 a damaged shard", "15 a damaged checkpoint")  # what --quick does not see


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_case_of_each_kind_has_its_line(case, made, tmp_path, monkeypatch, capsys):
    make, level, words = CASES[case]
    read_only = tempfile.TemporaryFile

    def temporary(*args, **options):
        if "read-only" in str(options.get("dir")):
            raise OSError(30, os.strerror(30), options["dir"])
        return read_only(*args, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(made / "data")
    (tmp_path / "docs").symlink_to(made / "docs")
    work = tmp_path / "work"
    work.mkdir()
    found = diagnose(str(make(made, work)), whole=case in WHOLE)
    print(found)
    lines = [f"{about}: {text}" for known, about, text in found.findings if known == level]
    assert any(re.search(words, line) for line in lines), str(found)
    assert "\n" not in "".join(lines)


def test_every_kind_has_its_cases():
    kinds = [int(name.split()[0]) for name in CASES]
    assert set(kinds) == set(range(1, 19))
