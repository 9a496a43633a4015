"""A small modern decoder on the source and documentation text of Python's own standard library.

    lmjax train --config configs/quickstart.py --workdir runs/quickstart

Nothing is downloaded: the corpus comes with the interpreter. A few minutes on two CPU cores.
`configs/quickstart.py:tiny` is the same recipe shrunk to seconds, for tests.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.model = dict(
        num_layers=4,
        embed_dim=192,
        num_heads=6,
        num_kv_heads=3,
        mlp_dim=512,
        qk_norm=True,  # keeps attention logits in range at this learning rate
        tie_embeddings=True,  # at this size a second table would be a third of the model
        scan_layers=False,  # four layers compile fast enough one by one, and run faster on a CPU
    )
    config.data = dict(
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(vocab_size=4096, train_bytes=8_000_000),
        seq_len=256,
        packing="best_fit",
    )
    config.optimizer = dict(name="adamw", peak_lr=3e-3, warmup_steps=50, weight_decay=0.1, clip_norm=1.0)
    config.train = dict(steps=600, batch_size=16)
    config.eval = dict(every=100, batches=16)
    config.checkpoint = dict(every=100, keep_last=2)
    config.sample = dict(every=200, prompts=["def ", "import ", "class ", "The "], max_tokens=64)
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, mlp_dim=64)
        config.data.update(seq_len=64)
        config.data.tokenizer.update(vocab_size=512, train_bytes=200_000)
        config.train.update(steps=20, batch_size=8)
        config.eval.update(every=10, batches=2)
        config.checkpoint.update(every=5)
        config.sample.update(every=10, max_tokens=8)
        config.optimizer.update(warmup_steps=5)
    return config
