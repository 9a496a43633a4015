"""Tagging: words and their pieces, what is cut and refused, entities as seqeval counts them."""

import random

import hub_tokenizers
import numpy as np
import pytest
from bert_twins import MISSING, Twins

from lmjax import huggingface
from lmjax.config import build
from lmjax.data.config import DataConfig
from lmjax.data.reading import make_reader
from lmjax.data.tokenizers import TokenizerConfig, sentencepiece_tokenizer
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encdec import EncDecConfig
from lmjax.models.encoder import EncoderConfig
from lmjax.models.heads import HeadConfig
from lmjax.models.presets import with_preset
from lmjax.tasks.entities import Entity, entities, entity_scores
from lmjax.tasks.questions import Questions
from lmjax.tasks.tagging import Tagging
from lmjax.tasks.task import Predicted, Sizes

ROW = Sizes(64)
WORDS = "John Smith flew to New York , unbelievably fast".split()
TAGS = "B-PER I-PER O O B-LOC I-LOC O O O".split()
RECORD = {"words": WORDS, "tags": TAGS}
FACTS = Tagging().facts([RECORD])


def own_tokenizer(**settings):
    texts = ["John Smith flew to New York , fast and faster than New Jersey ."] * 30
    return sentencepiece_tokenizer(TokenizerConfig(vocab_size=290, **settings), texts)


def reader_of(tokenizer, family="encoder"):
    return make_reader(tokenizer, family, DataConfig(), {})


@pytest.fixture(scope="module")
def reader():
    return reader_of(own_tokenizer())


def pieces_of(reader, encoded):
    """The ids at the first piece of each word and after it, up to the next word."""
    found = {}
    word = 0
    inner = slice(len(reader.prefix), len(encoded.columns["tokens"]) - len(reader.suffix))
    for token, number in zip(encoded.columns["tokens"][inner], encoded.columns["words"][inner],
                             strict=True):
        word = int(number) or word
        found.setdefault(word - 1, []).append(int(token))
    return found


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_the_first_piece_of_every_word_has_its_tag(family):
    reader = reader_of(own_tokenizer(), family)
    encoded = Tagging().encode(RECORD, reader, FACTS, ROW)
    columns = encoded.columns
    pieces = pieces_of(reader, encoded)
    assert [*pieces] == list(range(len(WORDS))) and any(len(its) > 1 for its in pieces.values())
    assert [*columns["tokens"]] == reader.ids(" ".join(WORDS))  # words are read as their text is
    at = np.flatnonzero(columns["loss_mask"])
    assert [FACTS["labels"][i] for i in columns["targets"][at]] == TAGS
    assert [*columns["words"][at]] == [*range(1, len(WORDS) + 1)]
    every = Tagging(label_all_pieces=True).encode(RECORD, reader, FACTS, ROW).columns
    inner = slice(len(reader.prefix), len(every["tokens"]) - len(reader.suffix))
    assert every["loss_mask"][inner].all() and every["loss_mask"].sum() == len(
        every["tokens"]) - len(reader.prefix) - len(reader.suffix)
    spelt = [TAGS[i] for i, its in sorted(pieces.items()) for _ in its]
    assert [FACTS["labels"][i] for i in every["targets"][inner]] == spelt
    unseen = Tagging().encode({"words": WORDS}, reader, FACTS, ROW, labelled=False).columns
    assert np.array_equal(unseen["loss_mask"], columns["loss_mask"]) and not unseen["targets"].any()


@pytest.mark.long
@pytest.mark.parametrize("made", [hub_tokenizers.word_piece, hub_tokenizers.byte_level,
                                  hub_tokenizers.unigram, hub_tokenizers.llama])
def test_words_are_read_as_transformers_reads_them(made, tmp_path):
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    tokenizer = huggingface.read_tokenizer(made(tmp_path))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), add_prefix_space=True)
    if made is hub_tokenizers.byte_level:  # as RobertaTokenizerFast(add_prefix_space=True)
        from tokenizers import pre_tokenizers
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rng = random.Random(0)
    for _ in range(20):
        words = rng.choices([*"The cat sat, a dog's mat. A".split(), "x1", "\u00e9t\u00e9", "T"],
                            k=7)
        wanted = theirs(words, is_split_into_words=True, add_special_tokens=False)
        found = tokenizer.encode_words(words)
        assert sum(found, []) == wanted["input_ids"]
        numbers = [i for i, ids in enumerate(found) for _ in ids]
        assert numbers == wanted.word_ids()


def test_an_exported_tokenizer_reads_words_with_the_spaces_between_them(tmp_path):
    """Without a rule that puts a space before a text, words after the first need one."""
    tokenizers = pytest.importorskip("tokenizers", reason=f"tokenizers {MISSING}")
    vocab = {piece: i for i, piece in enumerate(["<s>", "</s>", "a", "b", "\u2581", "\u2581b"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("\u2581", "b")]))
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer = huggingface.read_tokenizer(hub_tokenizers.save(tmp_path, made))
    assert tokenizer.encode_words(["a", "b", "b"]) == [[2], [5], [5]]
    assert tokenizer.encode("a b b") == [2, 5, 5]


def test_a_long_sentence_is_cut_between_words_and_counted(reader):
    task, tokenizer = Tagging(), reader.names.tokenizer
    lengths = [len(ids) for ids in tokenizer.encode_words(WORDS)]
    for room in range(3, sum(lengths) + 4):
        encoded = task.encode(RECORD, reader, FACTS, Sizes(room))
        pieces = pieces_of(reader, encoded)
        kept = [len(its) for its in pieces.values()]
        assert len(encoded.columns["tokens"]) <= room and sum(kept) + encoded.cut == sum(lengths)
        whole = room - 2 >= lengths[0]
        assert kept == (lengths[: len(kept)] if whole else [room - 2])
        if whole and encoded.cut:
            assert sum(kept) + lengths[len(kept)] > room - 2


def test_words_that_the_model_did_not_read_have_no_tag_and_count_as_wrong(reader):
    task, room = Tagging(), 8
    columns = task.encode(RECORD, reader, FACTS, Sizes(room)).columns
    read = int(columns["words"].max())
    assert 0 < read < len(WORDS)
    arrays = {"words": columns["words"], "predicted": columns["targets"],
              "confidence": np.full(len(columns["words"]), 0.5, np.float32)}
    predicted = Predicted("1", RECORD, arrays)
    answer = task.answer(predicted, FACTS)
    assert answer["tags"] == [*TAGS[:read], *[None] * (len(WORDS) - read)]
    assert answer["confidence"] == [*[0.5] * read, *[0.0] * (len(WORDS) - read)]
    assert answer["entities"][0] == {"text": "John Smith"[: 4 if read == 1 else 10],
                                     "label": "PER", "start": 0, "end": min(read, 2),
                                     "confidence": 0.5}
    assert task.metrics([predicted], FACTS)["accuracy"] == pytest.approx(read / len(WORDS))


def test_tags_may_be_numbers_of_labels_and_a_scheme_is_seen_or_stated():
    assert FACTS["scheme"] == "iob2"
    assert FACTS["labels"] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert FACTS["counts"] == [5, 1, 1, 1, 1]
    labels = ("O", "B-PER", "I-PER")
    task = Tagging(labels=labels)
    record = {"words": ["a", "b", "c"], "tags": [1, 2, 0]}
    assert task.truth(record) == ["B-PER", "I-PER", "O"]
    assert task.facts([record])["counts"] == [1, 1, 1]
    assert Tagging(scheme="none").facts([RECORD])["scheme"] == "none"
    assert Tagging().facts([{"words": ["a", "b"], "tags": ["NN", "VB"]}])["scheme"] == "none"
    assert Tagging().truth({"words": ["a", "b"], "tags": [3, 0]}) == ["3", "0"]


@pytest.mark.parametrize("task, record, said", [
    (Tagging(), {"words": WORDS, "tags": TAGS[:-1]}, "a list of 9 tags .*, got 8 tags"),
    (Tagging(), {"words": WORDS, "tags": "O"}, "a list of 9 tags"),
    (Tagging(), {"words": WORDS, "tags": ["B-DOG", *TAGS[1:]]}, "one of the labels .*'B-DOG'"),
    (Tagging(), {"words": [], "tags": []}, r"a list of words under 'words', got \[\]"),
    (Tagging(), {"words": "John", "tags": ["O"]}, "a list of words"),
    (Tagging(labels=("O", "B-PER")), {"words": ["a"], "tags": [2]}, "one of the labels .*'2'"),
])
def test_a_record_that_is_no_example_is_one_line(task, record, said, reader):
    with pytest.raises(UserError, match=said) as caught:
        task.encode(record, reader, {**FACTS, "labels": list(task.labels) or FACTS["labels"]}, ROW)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task, records, said", [
    (Tagging(labels=("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG")), [RECORD],
     "a training example of every class, got none of 'B-ORG'"),
    (Tagging(scheme="iob2"), [{"words": ["a", "b"], "tags": ["NN", "O"]}], "tags O, B-X and I-X"),
    (Tagging(), [{"words": ["a"], "tags": ["O"]}], "at least two tags"),
])
def test_tags_that_cannot_be_learned_are_one_line(task, records, said):
    with pytest.raises(UserError, match=said):
        task.facts(records)


def test_a_config_that_means_nothing_is_refused():
    for wrong in (dict(scheme="bio"), dict(labels=["a", "a"]), dict(head_kind="x")):
        with pytest.raises(UserError):
            build(Tagging, wrong)
    with pytest.raises(UserError, match="a decoder or an encoder"):
        Tagging().check(EncDecConfig())
    Tagging().check(DecoderConfig())


@pytest.mark.parametrize("preset, kind", [
    ("modernbert-base", "transform"), ("bert-base", "linear"), ("roberta-base", "linear"),
    ("llama3.1-8b", "linear")])
def test_the_head_is_that_of_transformers(preset, kind):
    classes = {"encoder": EncoderConfig, "decoder": DecoderConfig}
    settings = with_preset({"preset": preset})
    model = build(classes[settings.get("family", "decoder")], settings)
    assert Tagging().head(model, FACTS) == HeadConfig(5, kind, 0.1)
    assert Tagging(head_kind="plain").head(model, FACTS).kind == "plain"
    assert Questions().head(model, {}) == HeadConfig(2, kind, 0.0)


def test_entities_and_their_scores_are_those_of_seqeval():
    """Over every kind of invalid sequence: I after O, after another label, at the beginning."""
    seqeval = pytest.importorskip("seqeval.metrics", reason=f"seqeval {MISSING}")
    get_entities = seqeval.sequence_labeling.get_entities
    rng, tags = random.Random(0), ["O", "B-A", "I-A", "B-B", "I-B", "B-A-B", "I-A-B"]
    several = []
    for _ in range(3000):
        truth = rng.choices(tags, k=rng.randint(1, 9))
        found = [tag if rng.random() < 0.7 else rng.choice(tags) for tag in truth]
        wanted = [(label, first, last + 1) for label, first, last in get_entities(found)]
        assert [tuple(entity) for entity in entities(found)] == wanted, found
        several.append((found, truth))
    for at in range(0, 3000, 300):
        found, truth = map(list, zip(*several[at : at + 300], strict=True))
        ours = entity_scores(found, truth)
        assert ours["precision"] == pytest.approx(seqeval.precision_score(truth, found))
        assert ours["recall"] == pytest.approx(seqeval.recall_score(truth, found))
        assert ours["f1"] == pytest.approx(seqeval.f1_score(truth, found))
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}
    assert entities(["B-A", None, "I-A"]) == [Entity("A", 0, 1), Entity("A", 2, 3)]


def test_without_entities_the_figures_are_means_over_tags():
    metrics = pytest.importorskip("sklearn.metrics", reason=f"scikit-learn {MISSING}")
    task, rng = Tagging(), random.Random(0)
    labels, predicted = ["DT", "NN", "VB"], []
    for i in range(40):
        n = rng.randint(1, 6)
        record = {"words": ["w"] * n, "tags": rng.choices(labels, k=n)}
        predicted.append(Predicted(str(i), record, {
            "words": np.arange(n + 1), "confidence": np.ones(n + 1),
            "predicted": np.array([0, *(rng.randrange(3) for _ in range(n))])}))
    found = task.metrics(predicted, {"labels": labels, "scheme": "none"})
    flat = [tag for p in predicted for tag in p.record["tags"]]
    got = [labels[i] for p in predicted for i in p.arrays["predicted"][1:]]
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(flat, got))
    for name in ("precision", "recall", "f1"):
        score = getattr(metrics, f"{name}_score")
        assert found[name] == pytest.approx(score(flat, got, average="macro"))


@pytest.mark.long
def test_a_step_is_that_of_transformers(tmp_path):
    twins = Twins(tmp_path, "BertForTokenClassification", "classifier", 5)
    import torch
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(1, 64, (4, 20), np.int32),
             "targets": rng.integers(0, 5, (4, 20), np.int32),
             "token_types": rng.integers(0, 2, (4, 20), np.int32),
             "positions": np.tile(np.arange(20, dtype=np.int32), (4, 1)),
             "loss_mask": (rng.random((4, 20)) < 0.6).astype(np.float32),
             "segment_ids": (np.arange(20) < np.array([[20], [13], [20], [7]])).astype(np.int32)}
    batch["loss_mask"] *= batch["segment_ids"]

    def theirs(model):
        labels = np.where(batch["loss_mask"] > 0, batch["targets"], -100)
        return model(input_ids=torch.tensor(batch["tokens"]).long(),
                     token_type_ids=torch.tensor(batch["token_types"]).long(),
                     attention_mask=torch.tensor(batch["segment_ids"]),
                     labels=torch.tensor(labels).long()).loss

    twins.check_step(Tagging().loss(twins.model, FACTS), batch, theirs=theirs)
