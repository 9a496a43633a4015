"""Objectives: exact counts, nothing lost, choices as random as stated, rows the same everywhere."""

import itertools

import numpy as np
import pytest

from lmjax.data.augmentation import AugmentConfig
from lmjax.data.batches import eval_batches
from lmjax.data.config import DataConfig
from lmjax.data.denoising import UL2, Denoiser, noise_counts, random_parts
from lmjax.data.hashing import fold, key_of
from lmjax.data.objectives import Objective, ObjectiveConfig
from lmjax.data.pipeline import PackedRows, open_splits
from lmjax.data.rows import START_ID
from lmjax.data.synthetic import SyntheticRows
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import TokenizerConfig

V, BOS, EOS = 1000, 1, 2


class Corpus:
    """Documents in memory: BOS, text without special ids, EOS."""

    specials, bytes, fingerprint = (BOS, EOS), 1, "corpus"

    def __init__(self, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.documents = [np.concatenate([[BOS], rng.integers(4, V, n), [EOS]]).astype(np.uint16)
                          for n in lengths]
        self.tokens = np.concatenate(self.documents)
        self.offsets = np.concatenate([[0], np.cumsum([len(d) for d in self.documents])])
        self.lengths = np.diff(self.offsets) - 1
        self.predictions = int(self.lengths.sum())
        self.ids = [str(i) for i in range(len(self.documents))]

    def gather(self, starts, lengths):
        return self.tokens, starts


def lengths(count, most, seed=1):
    return np.concatenate([[0, 1, 2, 3], np.random.default_rng(seed).integers(1, most, count)])


def rows_of(config, seq_len, corpus, method="best_fit", **kwargs):
    objective = Objective(config, seq_len=seq_len, vocab_size=V)
    source = PackedRows(corpus, objective, name="corpus", method=method, **kwargs)
    return source, source.rows_at(np.arange(source.num_rows),
                                  fold(key_of("test"), np.arange(source.num_rows)))


def pieces(source):
    """(row, segment, the stored tokens that the objective counts) of every piece, in order."""
    begin = source.objective.kind.skipped
    for row in range(source.num_rows):
        for segment, (document, start, length) in enumerate(source.documents_at(row), 1):
            stored = source.store.documents[int(document)]
            yield row, segment, stored[begin + start : begin + start + length].astype(int).tolist()


def segment_of(rows, name, row, segment):
    ids = rows["encoder_segment_ids" if name.startswith("encoder_") else "segment_ids"][row]
    return rows[name][row][ids == segment].tolist()


def t5_lengths(inputs_length, density, mean):
    """The longest text whose inputs fit, and its targets, as in T5's `random_spans_helper`."""
    def both(n):
        noise = round(n * density)
        spans = round(noise / mean)
        return n - noise + spans + 1, noise + spans + 1

    n = inputs_length
    while both(n + 1)[0] <= inputs_length:
        n += 1
    return n, both(n)[1]


@pytest.mark.parametrize("seq_len, density, mean",
                         [(512, 0.15, 3.0), (256, 0.15, 3.0), (512, 0.5, 3.0),
                                                    (1024, 0.15, 8.0), (114, 0.3, 2.0)])
def test_t5s_arithmetic(seq_len, density, mean):
    config = ObjectiveConfig("span_corruption", denoisers=(Denoiser(density, mean),), sentinels=500)
    objective = Objective(config, seq_len=seq_len, vocab_size=V)
    assert (objective.longest, objective.fields["targets"]) == t5_lengths(seq_len, density, mean)
    if (seq_len, density) == (512, 0.15):
        assert (objective.longest, objective.fields["targets"]) == (568, 114)


def test_a_row_of_568_tokens_fills_512_inputs_and_114_targets():
    source, rows = rows_of(ObjectiveConfig("span_corruption"), 512, Corpus([568] * 20))
    assert source.num_rows == 20
    assert rows["encoder_tokens"].shape == (20, 512) and rows["targets"].shape == (20, 114)
    assert (rows["encoder_segment_ids"] == 1).all() and (rows["loss_mask"] == 1).all()
    first, last = source.objective.ids["<extra_id_0>"], source.objective.ids["<extra_id_27>"]
    assert (first, last) == (V + 99, V + 72)
    for row in rows["targets"]:
        np.testing.assert_array_equal(row[row >= V], np.arange(first, last - 1, -1))


def test_infilling_writes_the_text_of_which_a_mask_hides_each_span():
    corpus, config = Corpus(lengths(400, 80)), ObjectiveConfig("text_infilling")
    source, rows = rows_of(config, 64, corpus)
    assert source.objective.ids == {"[MASK]": V} and source.objective.vocab_size == V + 1
    shares, spans = [], []
    for row, segment, text in pieces(source):
        inputs, targets = (segment_of(rows, name, row, segment)
                           for name in ("encoder_tokens", "targets"))
        assert targets == [*text, EOS] and inputs[-1] == EOS
        assert segment_of(rows, "tokens", row, segment) == [START_ID, *text]
        parts, at = [[]], 0
        for token in inputs[:-1]:
            parts = [*parts, []] if token == V else [*parts[:-1], [*parts[-1], token]]
        for part in parts:  # in the order of the text, with at least a token hidden between them
            at = next(i for i in range(at, len(text) + 1) if text[i:i + len(part)] == part)
            at += len(part) + (len(text) > 1)  # a text of one token has a mask after it
        kept, count = sum(map(len, parts)), len(parts) - 1
        if len(text) > 20:
            shares.append(1 - kept / len(text))
            spans.append((len(text) - kept) / count)
    assert np.mean(shares) == pytest.approx(0.3, abs=0.01)
    assert np.mean(spans) == pytest.approx(3, abs=0.15)


def restored(inputs, targets, objective):
    """The text that inputs and targets stand for, token by token."""
    sentinels = {objective.ids[f"<extra_id_{i}>"] for i in range(objective.config.sentinels)}
    assert inputs[-1] == EOS and targets[-1] == EOS
    hidden, current = {}, None
    for token in targets[:-1]:
        if token in sentinels:
            assert token not in hidden
            hidden[token] = current = []
        else:
            current.append(token)
    out = []
    for token in inputs[:-1]:
        if token in sentinels:
            out += hidden.pop(token)
        elif token < V:  # else a mode
            out.append(token)
    assert not hidden
    return out


@pytest.mark.parametrize("config, seq_len, longest, least", [
    (ObjectiveConfig("span_corruption"), 64, 200, 0.9), (ObjectiveConfig("ul2"), 128, 300, 0.6),
    (ObjectiveConfig("span_corruption", denoisers=(Denoiser(0.25, 0.0),)), 40, 90, 0.85)])
def test_spans_lose_nothing_over_thousands_of_rows(config, seq_len, longest, least):
    corpus = Corpus(lengths(2500, longest))
    source, rows = rows_of(config, seq_len, corpus)
    assert source.num_rows > 1000
    told = []
    for row, segment, text in pieces(source):
        inputs, targets = (segment_of(rows, name, row, segment)
                           for name in ("encoder_tokens", "targets"))
        assert restored(inputs, targets, source.objective) == text
        assert segment_of(rows, "tokens", row, segment) == [START_ID, *targets[:-1]]
        for prefix, tokens in (("encoder_", inputs), ("", targets)):
            assert segment_of(rows, f"{prefix}positions", row, segment) == list(range(len(tokens)))
        told += text
    # And the pieces are the whole text, once.
    np.testing.assert_array_equal(np.sort(told), np.sort(corpus.tokens[corpus.tokens >= 4]))
    np.testing.assert_array_equal(rows["loss_mask"], rows["segment_ids"] > 0)
    # UL2's rows have room for the denoiser with the longest targets.
    assert (rows["encoder_segment_ids"] > 0).mean() > least


def test_how_much_is_hidden():
    n = np.arange(1, 30_000)
    for d in (Denoiser(), *UL2):
        noise, spans = noise_counts(n, d.density, d.mean_span)
        assert (np.abs(noise - n * d.density)[n > 10] <= 0.5).all() and (noise <= n - 1).all()
        assert (spans >= 1).all() and (spans <= np.maximum(np.minimum(noise, n - noise), 1)).all()
        if d.mean_span:
            big = n > 20_000
            assert np.abs(noise[big] / spans[big] - d.mean_span).max() < 0.02 * d.mean_span
        else:
            assert (spans == 1).all()


def test_all_ways_to_cut_are_equally_likely():
    """4 spans of 9 tokens: C(8, 3) = 56 ways."""
    trials = 56 * 300
    parts = random_parts(np.full(trials, 9), np.full(trials, 4),
                         fold(key_of("ways"), np.arange(trials))).reshape(-1, 4)
    assert (parts >= 1).all() and (parts.sum(axis=1) == 9).all()
    ways, counts = np.unique(parts, axis=0, return_counts=True)
    assert len(ways) == 56
    chi2 = ((counts - 300) ** 2 / 300).sum()
    assert abs(chi2 - 55) < 5 * np.sqrt(2 * 55)


def test_ul2_uses_every_denoiser_as_often():
    source, rows = rows_of(ObjectiveConfig("ul2"), 512, Corpus([500] * 1400))
    modes = rows["encoder_tokens"][rows["encoder_positions"] == 0]
    modes = modes[modes > 0]
    ids = source.objective.ids
    assert [ids[name] for name in ("[NLU]", "[S2S]", "[NLG]")] == [V, V + 1, V + 2]
    shares = [(modes == source.objective.ids[name]).mean()
              for name in ("[NLU]", "[S2S]", "[NLG]")]
    np.testing.assert_allclose(shares, np.array([2, 1, 4]) / 7, atol=5 * np.sqrt(0.25 / len(modes)))


@pytest.mark.parametrize("method", ["best_fit", "concat", "none"])
def test_masking_hides_what_bert_hides(method):
    corpus = Corpus(lengths(3000, 150))
    source, rows = rows_of(ObjectiveConfig("masked_lm"), 64, corpus, method)
    mask = source.objective.ids["[MASK]"]
    assert mask == V and source.vocab_size == V + 1
    told = []
    for row, segment, text in pieces(source):
        assert segment_of(rows, "targets", row, segment) == text
        told += text
    # The targets are the whole text.
    np.testing.assert_array_equal(np.sort(told), np.sort(corpus.tokens))
    used, hidden = rows["segment_ids"] > 0, rows["loss_mask"] > 0
    assert not (hidden & ~used).any()
    np.testing.assert_array_equal(rows["tokens"][used & ~hidden], rows["targets"][used & ~hidden])
    text = used & (rows["targets"] >= 4)
    assert not (hidden & ~text).any()

    def near(got, want, n):
        assert abs(got - want) < 5 * np.sqrt(want * (1 - want) / n), (got, want)

    near(hidden.sum() / text.sum(), 0.15, text.sum())
    seen, was, n = rows["tokens"][hidden], rows["targets"][hidden], hidden.sum()
    near((seen == mask).mean(), 0.8, n)
    near((seen == was).mean(), 0.1 + 0.1 / V, n)
    other = seen[(seen != mask) & (seen != was)]
    assert abs(other.mean() - V / 2) < 5 * V / np.sqrt(12 * len(other))


def test_whole_words_are_hidden_together():
    """Tokens divisible by 3 begin a word; those divisible by 50 also end one."""
    ids = np.arange(V)
    words = (ids % 3 == 0) | (ids < 4), (ids % 50 == 0) | (ids < 4)
    _, rows = rows_of(ObjectiveConfig("masked_lm", whole_word=True), 64, Corpus(lengths(2000, 100)),
                      words=words)
    hidden, target, position = rows["loss_mask"] > 0, rows["targets"], rows["positions"]
    inside = (position[:, 1:] > 0) & ~words[0][target[:, 1:]] & ~words[1][target[:, :-1]]
    assert (hidden[:, 1:] == hidden[:, :-1])[inside].all()
    assert inside.sum() > 1000 and 0.1 < hidden.sum() / (target >= 4).sum() < 0.2
    assert (hidden[:, 1:] != hidden[:, :-1])[~inside & (position[:, 1:] > 0)].mean() > 0.2


@pytest.mark.parametrize("method", ["best_fit", "concat"])
def test_a_prefix_is_seen_whole_and_never_predicted(method):
    corpus = Corpus(lengths(2000, 100))
    source, rows = rows_of(ObjectiveConfig("prefix_lm"), 64, corpus, method)
    _, causal = rows_of(ObjectiveConfig(), 64, corpus, method)
    for name in ("tokens", "targets", "segment_ids", "positions"):
        np.testing.assert_array_equal(rows[name], causal[name])
    shares = []
    for row, segment, text in pieces(source):
        both, loss = (segment_of(rows, name, row, segment)
                      for name in ("bidirectional", "loss_mask"))
        n, prefix = len(text), sum(both)
        assert 1 <= prefix <= n and both == [1] * prefix + [0] * (n - prefix)
        # Position i predicts token i + 1, which the prefix must not show.
        assert loss == [0.0] * (prefix - 1) + [1.0] * (n - prefix + 1)
        shares += [prefix / n] if n > 20 else []
    assert abs(np.mean(shares) - 0.5) < 0.03 and abs(np.var(shares) - 1 / 12) < 0.01


def test_inserted_tokens_are_read_and_never_predicted():
    rates = {"mask": 0.1, "replace": 0.1, "insert": 0.1, "delete": 0.1}
    corpus = Corpus(lengths(3000, 150))
    source, rows = rows_of(ObjectiveConfig(augment=AugmentConfig(share=0.7, **rates)), 64, corpus)
    kept = np.zeros(4)  # tokens hidden, replaced, inserted, deleted
    text_tokens, noised, long = 0, 0, 0
    for row, segment, _ in pieces(source):
        document, start, length = source.documents_at(row)[segment - 1]
        stored = corpus.documents[int(document)][start : start + length + 1].tolist()
        tokens, targets, loss = (segment_of(rows, n, row, segment)
                                 for n in ("tokens", "targets", "loss_mask"))
        # Both ends stay.
        assert tokens[0] == stored[0] and targets[-1] == stored[-1] and loss[-1] == 1
        real = [t for t, counts in zip(targets, loss, strict=True) if counts]
        rest = iter(stored[1:])
        # A subsequence: the text without the deleted tokens, in its order.
        assert all(t in rest for t in real)
        gone, added = length - len(real), len(targets) - len(real)
        pairs = [(s, t) for s, t, c in zip(tokens[1:], targets, loss, strict=False) if c]
        wrong = [s for s, t in pairs if s != t]
        hidden = wrong.count(V)
        if gone + added + len(wrong) == 0:
            assert tokens == stored[:-1] and targets == stored[1:]
        if length > 50:
            noised, long = noised + (gone + added + len(wrong) > 0), long + 1
        text_tokens += length - 1
        kept += [hidden, len(wrong) - hidden, added, gone]
    np.testing.assert_allclose(kept / text_tokens, 0.07, atol=0.006)
    assert abs(noised / long - 0.7) < 0.06, (noised, long)


def test_no_augmentation_is_no_change():
    _, plain = rows_of(ObjectiveConfig(), 64, Corpus(lengths(50, 100)))
    config = AugmentConfig(share=1.0, mask=0.0, replace=0.0, insert=0.0, delete=0.0)
    source, rows = rows_of(ObjectiveConfig(augment=config), 64, Corpus(lengths(50, 100)))
    assert source.vocab_size == V
    for name in plain:
        np.testing.assert_array_equal(rows[name], plain[name])


ALL = {name: ObjectiveConfig(name)
       for name in ("causal_lm", "prefix_lm", "masked_lm", "span_corruption", "ul2",
                    "text_infilling")}
ALL["augmented"] = ObjectiveConfig(augment=AugmentConfig(share=1.0, mask=0.1))


def split_of(objective, seed):
    sources = (SourceConfig("a", "synthetic:60", 1.0), SourceConfig("b", "synthetic:60", 2.0))
    return open_splits(DataConfig(sources=sources, tokenizer=TokenizerConfig(V), seq_len=48,
                                  objective=objective,
                                  seed=seed))


@pytest.mark.parametrize("name", ALL)
def test_a_row_is_a_pure_function_of_seed_and_number(name):
    (train, heldout), (again, _), (other, _) = (split_of(ALL[name], seed) for seed in (0, 0, 1))
    assert train.fingerprint == again.fingerprint != other.fingerprint
    g = np.random.default_rng(0).integers(0, 10**6, 24)
    whole = train.rows(g)
    assert {field: values.shape[1] for field, values in whole.items()} == train.fields
    for i in range(24):
        one = again.rows(g[i : i + 1])
        assert all(np.array_equal(one[field][0], whole[field][i]) for field in train.fields)
    if name != "causal_lm":  # another epoch makes other choices
        source, epoch, row = train.locate(np.arange(2000))
        first, later = (np.flatnonzero((source == 1) & (row == 3) & (epoch == e))[0]
                        for e in (0, 1))
        a, b = (train.rows(np.array([number])) for number in (first, later))
        assert any(not np.array_equal(a[field], b[field]) for field in a)
    if name == "augmented":  # only training rows are augmented
        plain = split_of(ALL["causal_lm"], 0)[1]
        assert all(np.array_equal(heldout.rows(np.arange(2))[f], plain.rows(np.arange(2))[f])
                   for f in plain.fields)
    batches = list(eval_batches(heldout, 8, one_device()))
    assert sum(float(b["loss_mask"].sum()) for b in batches) > 0
    assert all(b["tokens"].dtype == np.int32 and b["loss_mask"].dtype == np.float32
               for b in batches)


def one_device():
    import jax

    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_generated_documents_are_the_rows_that_they_come_from():
    rows = SyntheticRows(name="s", vocab_size=40, seq_len=32, num_rows=50, seed=0, split="train")
    documents, made = rows.documents(), rows.rows_at(np.arange(50))
    at = 0
    for row, segment in itertools.product(range(50), range(1, 33)):
        mine = made["segment_ids"][row] == segment
        if mine.any():
            stored = documents.tokens[documents.offsets[at] : documents.offsets[at + 1]]
            want = [*made["tokens"][row][mine], made["targets"][row][mine][-1]]
            np.testing.assert_array_equal(stored, want)
            assert documents.ids[at] == f"{row}/{segment}"
            at += 1
    assert at == len(documents.ids)
    assert documents.lengths.sum() == documents.predictions == rows.predictions


@pytest.mark.parametrize("make, message", [
    (lambda: ObjectiveConfig("t5"), "name: expected one of causal_lm"),
    (lambda: ObjectiveConfig("masked_lm", mask_rate=0.0), "mask_rate"),
    (lambda: ObjectiveConfig("masked_lm", mask_share=0.95), "mask_share"),
    (lambda: ObjectiveConfig("ul2", augment=AugmentConfig(share=0.1)),
     "augment.share: expected 0 for ul2"),
    (lambda: AugmentConfig(share=1.5), "share"),
    (lambda: AugmentConfig(mask=0.9, insert=0.9), "mask"),
    (lambda: Denoiser(density=1.0), "density"), (lambda: Denoiser(mean_span=0.5), "mean_span"),
    (lambda: Denoiser(weight=0.0), "weight"),
    (lambda: Objective(ObjectiveConfig("ul2"), seq_len=1024, vocab_size=V),
     r"sentinels: expected at least 189,"),
    (lambda: Objective(ObjectiveConfig("span_corruption"), seq_len=2, vocab_size=V),
     "seq_len: expected at least 3"),
    (lambda: DataConfig(packing="concat", objective=ObjectiveConfig("ul2")),
     "packing: expected best_fit or none"),
    (lambda: DataConfig(sources=(SourceConfig("s", "synthetic"),),
                        objective=ObjectiveConfig("masked_lm", whole_word=True)), "whole_word"),
])
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
