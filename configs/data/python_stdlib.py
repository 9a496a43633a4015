"""Python's own standard library as a corpus, prepared with every stage of `lmjax prepare`.

    lmjax prepare --config configs/data/python_stdlib.py --out runs/stdlib

Then open runs/stdlib/data_report.html. The corpus comes with the interpreter, so nothing is
downloaded. To train on the result, give a recipe the same `data` and `data.directory=runs/stdlib`.
"""

import sysconfig

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.data = dict(
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(
            vocab_size=4096,  # the quickstart's
            train_bytes=8_000_000,  # a sample of the corpus is enough
        ),
        clean=["newlines", "control", "nfc", "trailing_spaces", "blank_lines", "mask_email",
               "mask_ip"],
        curate=dict(
            # Thresholds for code, in which lines repeat. The published ones are for prose.
            gopher_repetition=dict(
                max_duplicate_lines=0.6,
                max_duplicate_line_chars=0.5,
                max_top_2gram_chars=0.3,
                max_duplicate_5gram_chars=0.6,
                max_duplicate_6gram_chars=0.6,
                max_duplicate_7gram_chars=0.6,
                max_duplicate_8gram_chars=0.6,
                max_duplicate_9gram_chars=0.6,
                max_duplicate_10gram_chars=0.6,
            ),
            dedup=dict(
                threshold=0.8,  # Jaccard similarity from which two documents are duplicates
                window=50,  # words; a passage this long that repeats is a licence or a copied test
                line_documents=50,  # a line in more documents than this stays only in the first
                line_chars=60,  # shorter lines stay
            ),
            # A part of the corpus stands in for an evaluation set, which must be removed.
            decontaminate=dict(sources=[
                dict(name="json", uri=f"text:{sysconfig.get_paths()['stdlib']}/json/*.py")]),
        ),
    )
    return config
