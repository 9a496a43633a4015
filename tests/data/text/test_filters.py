"""Cleaning, filters, languages and evaluation examples, on English, Chinese and Japanese text."""

import random
import sysconfig
import time
import unicodedata
from pathlib import Path

import pytest

from lmjax.data.config import DecontaminateConfig
from lmjax.data.preparation import decontaminate
from lmjax.data.text import clean, filters
from lmjax.data.text.features import FEATURES, STOP_WORDS, TextBatch
from lmjax.data.text.filters import FILTERS

ENGLISH = """The library reads every document of the corpus, and writes what it has found to a \
report. It is clear that
this takes time, because each of the files has to be looked at with care. We have seen that the \
result is good.

A second paragraph says something else. To be sure of that, you have to read it to the end. There \
is more to come, of
which the reader will be told later on, when the time for it has come and all of the others have \
gone home."""
CHINESE = """春天来了，花园里的树都长出了新的叶子。孩子们每天放学以后都到河边去玩，\
有的放风筝，有的捉小鱼。
老人坐在树下聊天，说起年轻时候的故事。天气渐渐暖和起来，大家的心情也越来越好。\
晚上下了一场小雨，第二天早晨的空气非常清新。"""
JAPANESE = """春になると、庭の木に新しい葉が出てきます。子どもたちは学校が終わると\
毎日川へ遊びに行きます。凧を上げる子も
いれば、小さな魚をつかまえる子もいます。お年寄りは木の下に座って、若いころの話をしています。夜に少し雨が降り、
次の朝の空気はとても気持ちがよかったです。"""


def test_languages_of_our_own_sentences_and_of_the_standard_librarys_text():
    cjk = Path(sysconfig.get_paths()["stdlib"]) / "test/cjkencodings"
    texts = [ENGLISH, CHINESE, JAPANESE, "x = [1, 2]\nfor y in x:\n    print(y)",
             "Das ist ein Satz, der nicht auf Englisch ist und von dem man das auch sieht.",
             "Это текст на русском языке, и в нём есть слова.", "안녕하세요 세계"]
    expected = ["en", "zh", "ja", "und", "de", "ru", "ko"]
    # Real text that comes with many builds of Python.
    for name, code in (("gb18030", "zh"), ("euc_jp", "ja")):
        if (cjk / f"{name}-utf8.txt").exists():
            texts.append((cjk / f"{name}-utf8.txt").read_text())
            expected.append(code)
    assert TextBatch(texts).languages == expected


@pytest.mark.parametrize("family", ["gopher_quality", "gopher_repetition", "c4", "fineweb"])
def test_good_text_of_each_language_passes_and_bad_does_not(family):
    limits = {family: FILTERS[family]()}
    assert filters.reject(TextBatch([ENGLISH, CHINESE, JAPANESE]), limits) == [None] * 3
    bad = {"gopher_quality": "word " * 30, "gopher_repetition": "The same line again.\n" * 20,
           "c4": "no sentence " * 30, "fineweb": "menu\nhome\nabout\n" * 5}[family]
    chinese = {"gopher_quality": "短文。", "gopher_repetition": "同一句话又来了。\n" * 20,
               "c4": "没有句子", "fineweb": "首页\n关于\n" * 9}
    verdicts = filters.reject(TextBatch([bad, chinese[family]]), limits)
    assert all(verdict and verdict[0].startswith(family) for verdict in verdicts)


def naive_duplicate_chars(text, n):
    words = text.lower().split()
    covered, seen = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        covered |= set(range(i, i + n)) if gram in seen else set()
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / sum(map(len, words))


def naive_top_chars(text, n):
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    best = max(((grams.count(g), sum(map(len, g))) for g in grams if grams.count(g) > 1),
               default=(0, 0))
    return best[0] * best[1] / sum(map(len, words))


def test_features_are_those_of_plain_loops():
    license = Path(sysconfig.get_paths()["stdlib"], "LICENSE.txt")
    texts = [ENGLISH, "a b c a b c a b c d e", "x " * 40, (ENGLISH + " ") * 2, "one"]
    texts += [license.read_text()[:3000]] if license.exists() else []
    for n in (5, 6, 10):
        batch = TextBatch(texts)
        got = [FEATURES[f"duplicate_{k}gram_chars"](batch) for k in range(5, n + 1)][-1]
        assert got == pytest.approx([naive_duplicate_chars(text, n) for text in texts])
    for n in (2, 3, 4):
        got = FEATURES[f"top_{n}gram_chars"](TextBatch(texts))
        assert got == pytest.approx([naive_top_chars(text, n) for text in texts])
    batch = TextBatch(texts)
    assert FEATURES["words"](batch).tolist() == [len(text.split()) for text in texts]
    assert FEATURES["alphabetic_words"](batch) == pytest.approx(
        [sum(any(c.isalpha() for c in w) for w in text.split()) / len(text.split())
         for text in texts])
    assert FEATURES["stop_words"](TextBatch([ENGLISH])) == [
        len(set(STOP_WORDS) & set(ENGLISH.lower().replace(",", " ").replace(".", " ").split()))]


@pytest.mark.parametrize("rule, before, after", [
    ("newlines", "a\r\nb\rc", "a\nb\nc"),
    ("control", "null\0 bell\x07 tab\t \ufeff", "null bell tab\t "),
    ("nfc", "cafe\u0301", "caf\u00e9"),
    ("ftfy", "schÃ¶n â€œquotedâ€\x9d", "schön “quoted”"),
    ("ftfy", "春天来了，花园。Ünïcode “quotes” ﬁne", "春天来了，花园。Ünïcode “quotes” ﬁne"),
    ("trailing_spaces", "a  \nb\t", "a\nb"),
    ("blank_lines", "a\n\n\n\n\n\nb\n\n\nc", "a\n\n\nb\n\n\nc"),
    ("boilerplate", "Text.\nPrivacy Policy\n© 2020 Someone. All rights reserved.\n"
     "The privacy policy changed.\n版权所有 某某\n終わり",
     "Text.\nThe privacy policy changed.\n終わり"),
    ("boilerplate", "Read more >>\n\nA\nloading... \nshare, share and share\nshare",
     "\nA\nshare, share and share\n"),
    ("c4_lines", "Menu\nThis is a whole sentence here.\nShort one.\n这是一个完整的句子。\n"
     "Please enable javascript to go on now.",
     "This is a whole sentence here.\n这是一个完整的句子。"),
    ("mask_email", "write to a.b@example.org, not @property", "write to <email>, not @property"),
    ("mask_ip", "8.8.8.8 but 127.0.0.1, 1.2.3 and 300.1.1.1",
     "<ip> but 127.0.0.1, 1.2.3 and 300.1.1.1"),
    ("mask_phone", "call +49 30 1234 5678 or 1 + 2", "call <phone> or 1 + 2"),
])
def test_cleaning_rules(rule, before, after):
    changes = {rule: (before, after)} if before != after else {}
    assert clean.clean(before, [rule]) == (after, changes)


def test_long_texts_are_composed_as_a_whole():
    rng = random.Random(0)
    units = ["e\u0301", "e\u0316\u0301", "\u1112\u1161\u11ab", "\u304b\u3099", "\u6625",
             "\u0e01\u0e48", "\u0958", " "]
    for common in units:  # of which most of the text is
        text = "".join(rng.choices([*units, *[common] * 20], k=9000))
        assert clean.clean(text, ["nfc"])[0] == unicodedata.normalize("NFC", text)


LONG = [" ", "\t", "\n", "1", ".", "-", "a", "@", "+1", "a@", "1.", "share ", "share\n", "\u00e9",
        "\u6625",
        "\u0301\u0316"]


def seconds(text):
    """Processor time of cleaning a text and of computing all its features."""
    start = time.process_time()
    clean.clean(text, clean.CLEANING_RULES)
    filters.reject(TextBatch([text]), {name: family() for name, family in FILTERS.items()})
    return time.process_time() - start


@pytest.mark.parametrize("begin, unit, end",
                         [*(("", unit, "") for unit in LONG), ("x", " ", "x \n"),
                                              ("read more", " ", "x"), ("a" * 64 + "@", "1.", "")])
def test_a_text_of_one_thing_takes_no_longer_than_its_length_says(begin, unit, end):
    seconds(begin + unit + end)  # tables that are made once
    short, long = (seconds(begin + unit * (size // len(unit)) + end) for size in (20_000, 80_000))
    assert long < 8 * short + 0.1, f"{short:.3f} s, and {long:.3f} s for four times as much"


def test_examples_are_found_by_words_and_by_letters_and_nothing_else_is(tmp_path):
    examples = [ENGLISH, CHINESE, JAPANESE, "too short"]
    config = DecontaminateConfig()
    counts = decontaminate.build_index(examples, config, str(tmp_path))
    assert [n > 0 for n in counts["words"]] == [True, True, True, False]
    assert counts["letters"][3] == 0
    index = decontaminate.Index(str(tmp_path), config)
    start = ENGLISH.index("because")
    words = ENGLISH.split()
    twelve = next(" ".join(words[i : i + 12]) for i in range(len(words))
                  if sum(c.isalnum() for c in "".join(words[i : i + 12])) >= 50)
    texts = ["Before. " + ENGLISH[start : start + 90].upper() + " after", "别的。" + CHINESE[10:60],
             JAPANESE[5:40].replace("、", " "),
             "Nothing of the kind is in here, and it is long enough to have thirteen words and "
             "fifty letters.", "", twelve]
    hits = {(hit["text"], hit["example"]) for hit in index.matches(texts)}
    assert hits == {(0, 0), (1, 1), (2, 2), (5, 0)}  # the last by its letters alone
