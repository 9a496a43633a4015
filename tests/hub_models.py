"""Directories of models as the hub has them: changed, cached, and compared with transformers."""

import shutil

import jax
import numpy as np
from exports import settings_of

import lmjax

V = 48  # ids of the models below


def theirs(path):
    """The logits of transformers for one row of ids."""
    import torch
    import transformers

    cls = getattr(transformers, settings_of(path)["architectures"][0])
    model = cls.from_pretrained(path, attn_implementation="eager").eval()
    ids = torch.tensor(row())
    more = dict(decoder_input_ids=ids.flip(1)) if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.numpy()


def ours(path):
    """Our logits of the same row."""
    lm = lmjax.load(path)
    ids = row().astype(np.int32)
    batch = {"tokens": ids, "segment_ids": np.ones_like(ids),
             "positions": np.arange(ids.shape[1], dtype=np.int32)[None]}
    if lm.model.config.family == "encdec":
        batch |= {f"encoder_{name}": value for name, value in batch.items()}
        batch["tokens"] = ids[:, ::-1]
    return np.asarray(jax.jit(lm.model.logits)(lm.params, batch))


def row():
    """Ids of one row."""
    return np.random.default_rng(0).integers(3, V, (1, 9))


def same(a, b):
    """Whether logits differ by rounding alone."""
    return np.abs(a - b).max() <= 2e-5 * np.abs(b).max()


def edit(path, change):
    """Rewrites model.safetensors: `change` alters the dict of its tensors."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()},
              path / "model.safetensors", metadata={"format": "pt"})


def rename(old, new):
    """Renames tensors: `old` in a name becomes `new`."""
    def change(tensors):
        for name in list(tensors):
            tensors[name.replace(old, new) if old else new + name] = tensors.pop(name)
    return change


def other(like, *names):
    """Adds tensors that differ from `like`."""
    def change(tensors):
        for name in names:
            tensors[name] = tensors[like][::-1] * 1.5
    return change


def cache(tmp_path, directory):
    """A hub's cache as huggingface_hub lays it out: a snapshot of links to blobs."""
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / "abc"
    (model / "refs").mkdir(parents=True)
    (model / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    (model / "snapshots" / "old").mkdir()
    (model / "refs" / "main").write_text("abc")
    for i, file in enumerate(directory.iterdir()):
        shutil.copy(file, model / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    return model
