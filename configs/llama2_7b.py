"""Llama-2 7B (Touvron et al. 2023, arXiv:2307.09288) on a slice of TPU v5e-256, 4 x 2048 tokens a chip.

    lmjax train --config configs/llama2_7b.py --workdir /mnt/runs/llama2_7b
    lmjax plan --config configs/llama2_7b.py --topology v5e-256
    # 2.44 .. 2.83 s a step, MFU 60.7% .. 70.3%, 14.4 of 15.75 GiB a chip
    lmjax plan --config configs/llama2_7b.py:v5p --topology v5p-128
    # 2.16 .. 2.60 s a step, MFU 58.9% .. 70.9%, 56.9 of 95.74 GiB a chip

`configs/llama2_7b.py:v5p` is the same on v5p-128 (64 chips), 4 x 4096 tokens a chip.
`configs/llama2_7b.py:tiny` is the recipe shrunk to seconds, for tests.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod

TOKENS = 2e12  # of the paper


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "v5p", "tiny"):
        raise ValueError(f"configs/llama2_7b.py: expected no variant, v5p or tiny, got {variant!r}; leave it out")
    if variant == "v5p":
        # Replicas along one side of the torus, weights split over the other two: over all three, this compiler gathers
        # them by all-reduce. What replicas sum is only a shard of the gradients.
        return pod("llama2-7b", batch_size=256, seq_len=4096, tokens=TOKENS, remat="query+key+value+kernel+out+gate+up",
                   mesh=dict(data=4, fsdp=-1))
    # Weights split over all chips: at 4 rows a chip a layer's arrive faster than it is computed. By both axes, each one
    # side of the torus, because along one ring gradients are reduce-scattered and over more they are all-reduced.
    # 2.1M tokens a step, half of the paper's: twice the steps on this slice.
    config = pod("llama2-7b", batch_size=1024, seq_len=2048, tokens=TOKENS, remat="attention",
                 mesh=dict(data=16, fsdp=-1, rules=dict(embed=("data", "fsdp"))))
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4, mlp_dim=128, vocab_size=256,
                            remat="full")
        config.mesh = dict(data=1, fsdp=-1)
        config.data.update(sources=[dict(name="chain", uri="synthetic")], tokenizer=dict(vocab_size=256), seq_len=64)
        config.optimizer.update(warmup_steps=5)
        config.train.update(steps=20, batch_size=16)
        config.eval.update(every=10, batches=2)
        config.checkpoint.update(every=10)
    return config
