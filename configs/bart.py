"""A small BART (Lewis et al. 2019, arXiv:1910.13461) on Python's own standard library.

    lmjax train --config configs/bart.py --workdir runs/bart
    lmjax train --config configs/bart.py:tiny --workdir runs/bart-tiny

The objective is text infilling: the encoder reads rows in which masks hide spans of tokens, and the
decoder writes the whole text. The corpus comes with the interpreter, so nothing is downloaded.
`configs/bart.py:tiny` is the same recipe, made small for tests: it takes seconds.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/bart.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.model = dict(
        preset="bart-base",
        num_layers=3,  # in the encoder and in the decoder; the preset has six
        embed_dim=192,
        num_heads=6,
        num_kv_heads=6,
        mlp_dim=768,  # four times embed_dim, as in the preset
        norm_position="pre",  # as in mBART, whose model type an export has
        dropout=0.0,  # the model is too small to overfit in so few steps
        vocab_size=0,  # as large as the tokenizer's
        scan_layers=False,  # on a CPU, three layers run faster without a scan, and compile fast
    )
    config.data = dict(
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(
            vocab_size=4095,  # with the mask 4,096, which a mesh divides evenly
            train_bytes=8_000_000,  # a sample of the corpus is enough for so few tokens
        ),
        seq_len=256,  # of the encoder; the length of the decoder's rows follows from it
        objective=dict(
            name="text_infilling",
            denoisers=[dict(density=0.3, mean_span=3.0)],  # the means of the paper
        ),
    )
    config.optimizer = dict(
        name="muon",  # as in configs/bert.py
        peak_lr=1e-2,
        schedule="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.train = dict(
        steps=2000,
        batch_size=8,  # 2,048 encoder tokens per step, and about 2,560 decoder tokens
    )
    config.eval = dict(
        every=200,
        batches=16,
    )
    config.checkpoint = dict(every=200)  # with each evaluation
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4, mlp_dim=128)
        config.data.update(seq_len=64)
        config.data.tokenizer.update(vocab_size=399, train_bytes=200_000)
        config.optimizer.update(warmup_steps=10)
        config.train.update(steps=150)
        config.eval.update(every=75, batches=2)
        config.checkpoint.update(every=75)
    return config
