"""The source and documentation text of Python's own standard library, with every stage of `lmjax prepare` switched on.

    lmjax prepare --config configs/data/python_stdlib.py --out runs/stdlib

Then look at runs/stdlib/data_report.html. Nothing is downloaded: the corpus comes with the interpreter. To train on
the result, give a recipe the same `data` and `data.directory=runs/stdlib`.
"""

import sysconfig

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.data = dict(
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(vocab_size=4096, train_bytes=8_000_000),
        clean=["newlines", "control", "nfc", "trailing_spaces", "blank_lines", "mask_email", "mask_ip"],
        curate=dict(
            # Thresholds for code: prose has two stop words in any text, code has lines that come again in it.
            gopher_repetition=dict(max_duplicate_lines=0.6, max_duplicate_line_chars=0.5, max_top_2gram_chars=0.3,
                                   max_duplicate_5gram_chars=0.6, max_duplicate_6gram_chars=0.6,
                                   max_duplicate_7gram_chars=0.6, max_duplicate_8gram_chars=0.6,
                                   max_duplicate_9gram_chars=0.6, max_duplicate_10gram_chars=0.6),
            # A window of 50 words that has come before is a licence, or a test that was copied.
            dedup=dict(threshold=0.8, window=50, line_documents=50, line_chars=60),
            # A part of the corpus itself stands in for an evaluation set: it has to go.
            decontaminate=dict(sources=[dict(name="json", uri=f"text:{sysconfig.get_paths()['stdlib']}/json/*.py")]),
        ),
    )
    return config
