"""What people's directories hold: each layout loads as in transformers, or gets a line with a fix.

`LAYOUTS` is the list. Each layout is made from one whole directory by a function.
"""

import json
import shutil
import struct

import pytest
from hub_models import cache, edit, ours, rename, same, theirs
from hub_tokenizers import SPECIAL, TEXTS, byte_level

import lmjax
from lmjax import huggingface
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.errors import UserError

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
SIZE = 280  # tokens of the tokenizer; the table has 8 rows more
WEIGHTS, CONFIG, TOKENS = "model.safetensors", "config.json", "tokenizer_config.json"
SHARD = "model-00001-of-00002.safetensors"
TEXT = "The cat <mask> sat<new>. [MASK]"


def tell(path, file, **keys):
    """Sets keys of a JSON file."""
    told = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps(told | keys))


def add(**files):
    """Adds files: name with __ for a dot -> content."""
    def change(path):
        for name, content in files.items():
            file = path / name.replace("__", ".")
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def renamed(new):
    return lambda path: (path / WEIGHTS).rename(path / new)


def shards(path, *, whole=False, index=True):
    """As a large model is saved; `whole` leaves the one file beside them, and differs from it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    if whole:
        model.model.norm.weight.data *= 2
    model.save_pretrained(path.parent / "shards", max_shard_size="10KB")
    for file in (path.parent / "shards").glob("model*"):
        shutil.copy(file, path)
    if not whole:
        (path / WEIGHTS).unlink()
    if not index:
        (path / f"{WEIGHTS}.index.json").unlink()


def other_formats(path):
    """A repository with the same weights in formats that lmjax does not read."""
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot"):
        (path / name).write_bytes(b"\x80")
    (path / "onnx").mkdir()
    (path / "onnx" / "model.onnx").write_bytes(b"x")
    for name in ("README.md", ".gitattributes", "LICENSE", "chat_template.jinja"):
        (path / name).write_text("x")


def half(path):
    import ml_dtypes

    edit(path, lambda t: t.update({k: x.astype(ml_dtypes.bfloat16) for k, x in t.items()}))
    tell(path, CONFIG, torch_dtype="bfloat16")


def buffers(path):
    import numpy as np

    edit(path, lambda t: t.update({
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)
        for i in range(2)}))


def sentencepiece(path, *, beside=False):
    """tokenizer.model alone, or beside a tokenizer.json that has more tokens."""
    model = train_tokenizer(TokenizerConfig(vocab_size=SIZE + 8), TEXTS)
    (path / "tokenizer.model").write_bytes(model.to_bytes())
    if not beside:
        (path / "tokenizer.json").unlink()
        (path / TOKENS).unlink()


def one_more(path):
    """More tokens than the table has rows, as Gemma 3."""
    import tokenizers

    file = str(path / "tokenizer.json")
    made = tokenizers.Tokenizer.from_file(file)
    made.add_special_tokens([f"<extra {i}>" for i in range(9)])
    made.save(file)


def without_json(path):
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text("{}")
    (path / "merges.txt").write_text("#version: 0.2\n")


def quantised(path):
    import numpy as np

    edit(path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int8)}))


def cut(path):
    raw = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def multimodal(path):
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({
        "model_type": "llava", "text_config": config, "vision_config": {}}))


def named(**keys):
    return lambda path: tell(path, TOKENS, **keys)


def gguf(path):
    (path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3))
    (path / WEIGHTS).unlink()
    (path / CONFIG).unlink()


def in_cache(path):
    return cache(path.parent, path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
# layout -> (what is done to the whole directory, its kind, the message; "": it loads)
LAYOUTS = {
    "as transformers saves it": (lambda path: None, "model", ""),
    "shards with their index": (shards, "model", ""),
    "one whole file beside an older index": (lambda p: shards(p, whole=True), "model", ""),
    "other formats and papers beside it": (other_formats, "model", ""),
    "a snapshot of the hub's cache": (in_cache, "hub cache", ""),
    "the file itself": (lambda path: path / WEIGHTS, "weights file", ""),
    "bfloat16": (half, "model", ""),
    "saved from torch.compile": (
        lambda p: edit(p, rename("", "_orig_mod.")), "model", ""),
    "buffers in the file": (buffers, "model", ""),
    "a config of unsloth": (lambda p: tell(
        p, CONFIG, unsloth_fixed=True, _attn_implementation_autoset=True), "model", ""),
    "added_tokens.json": (
        add(added_tokens__json=json.dumps({"<new>": SIZE, "<mask>": SIZE + 1})), "model", ""),
    "a mask that only the map names": (add(special_tokens_map__json=json.dumps(
        {"mask_token": {"content": "<mask>", "lstrip": True, "rstrip": False,
                        "normalized": False, "single_word": False}})), "model", ""),
    "a list of further tokens": (named(additional_special_tokens=["<new>"]), "model", ""),
    "more tokens than rows": (one_more, "model", ""),
    "tokenizer.model beside tokenizer.json": (
        lambda p: sentencepiece(p, beside=True), "model", ""),
    "tokenizer.model alone": (sentencepiece, "model", ""),
    "vocab.json and merges.txt": (without_json, "model", ""),  # without a tokenizer
    "shards without their index": (
        lambda p: shards(p, index=False), "model", "got model-00001.*fetch it .*safetensors.index"),
    "pytorch_model.bin": (renamed("pytorch_model.bin"), "model", "got pytorch_model.bin; .*conv"),
    "flax_model.msgpack": (renamed("flax_model.msgpack"), "model", "got flax_model.msgpack; "),
    "a variant": (renamed("model.fp16.safetensors"), "model", "got model.fp16.*rename a variant"),
    "one shard": (lambda p: renamed(SHARD)(p), "weights file", "expected a model's directory, .*"),
    "an adapter": (add(adapter_config__json="{}"), "adapter",
                   "peft_type to be 'LORA'.*merge_and_unload"),
    "GGUF": (gguf, "GGUF file", "a GGUF file; .*lmjax import-gguf FILE"),
    "a pointer in place of weights": (
        add(model__safetensors=POINTER), "model", "whole safetensors file, .*fetch it again"),
    "a download that broke off": (cut, "model", "whole safetensors file, .*fetch it again"),
    "quantised weights": (quantised, "model", "got I8; use weights that are not quantised"),
    "code of its own": (lambda p: tell(p, CONFIG, auto_map={"AutoModel": "modeling_x.X"}), "model",
                        "needs no code of its own, .*use a model type that it knows"),
    "a text model inside a larger one": (multimodal, "model", "model_type to be one of"),
    "a pointer in place of the tokenizer": (
        add(tokenizer__json=POINTER), "model", "expected a tokenizer.json, .*fetch it again"),
    "weights without config.json": (
        lambda p: (p / CONFIG).unlink(), "tokenizer", "expected a checkpoint, got none; "),
}
QUICK = ("as transformers saves it", "a variant", "an adapter", "code of its own",
         "weights without config.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small Llama with a byte-level tokenizer, as transformers writes it."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    path = tmp_path_factory.mktemp("layouts") / "whole"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=SIZE + 8, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1)).save_pretrained(path)
    byte_level(path)
    tell(path, TOKENS, tokenizer_class="PreTrainedTokenizerFast")
    return path


@pytest.mark.parametrize("layout", [pytest.param(
    layout, marks=[] if layout in QUICK else pytest.mark.long) for layout in LAYOUTS])
def test_a_layout_loads_as_in_transformers_or_gets_one_line(layout, whole, tmp_path):
    change, kind, message = LAYOUTS[layout]
    directory = shutil.copytree(whole, tmp_path / "hf")
    changed = change(directory)
    path = changed if changed is not None and kind != "model" else directory
    place = huggingface.identify(path)
    assert place.kind == kind
    if message:
        with pytest.raises(UserError, match=message) as raised:
            lmjax.load(path)
        assert "\n" not in str(raised.value) and "; " in str(raised.value)
        return
    assert place.fault is None
    if layout != "bfloat16":  # theirs computes in it
        as_saved = layout == "saved from torch.compile"  # theirs does not find these names
        assert same(ours(path), theirs(whole if as_saved else directory))
    compare_tokenizers(lmjax.load(path), directory)


def compare_tokenizers(lm, directory):
    """The same ids as transformers, except those that have no row; without one, a clear word."""
    import transformers

    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        with pytest.raises(UserError, match="write tokenizer.json with AutoTokenizer"):
            lm.generate([TEXT])
        return
    assert lm.tokenizer.vocab_size <= SIZE + 8
    if (directory / "tokenizer.json").exists():
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        assert lm.tokenizer.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
        names = [name for name in SPECIAL if name in theirs.get_vocab()]
        assert [lm.tokenizer.encode(name) for name in names] == [
            [theirs.convert_tokens_to_ids(name)] for name in names]


def test_the_list_has_twenty_layouts_and_more():
    assert len(LAYOUTS) >= 20 and set(QUICK) <= LAYOUTS.keys()
