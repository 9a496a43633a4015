"""The learnt filter finds planted junk of several kinds, and says the same of a text anywhere."""

import random

import numpy as np
import pytest
from small_corpus import name_of_word, sentences, shuffled

from lmjax.data.text import quality

pytestmark = pytest.mark.long
JUNK = 60  # texts of each kind


def templates(count):
    rng = random.Random(3)
    words = [name_of_word(i) for i in range(400)]
    return [" ".join(f"buy {rng.choice(words)} now {rng.choice(words)} free" for _ in range(9))
            for _ in range(count)]


@pytest.fixture(scope="module")
def learnt():
    good = sentences(900, seed=1)
    junk = {"shuffled": shuffled(sentences(JUNK, seed=2)), "template": templates(JUNK),
            "gibberish": ["".join(random.Random(i).choices("abcdefg ", k=300))
                          for i in range(JUNK)],
            "other language": [text.replace("a", "y") for text in sentences(JUNK, 4, words=300)]}
    corpus = good[300:] + [text for texts in junk.values() for text in texts]
    return quality.fit(good[:300], corpus, lost=0.01), good[300:], junk


def test_planted_junk_goes_and_good_text_stays(learnt):
    filter_, good, junk = learnt
    lost = (filter_.scores(good) < filter_.threshold).mean()
    found = {kind: (filter_.scores(texts) < filter_.threshold).mean()
             for kind, texts in junk.items()}
    assert lost < 0.02 and min(found.values()) >= 0.95, (lost, found)


def test_a_score_depends_on_the_text_alone_and_comes_back_from_a_file(learnt, tmp_path):
    filter_, good, junk = learnt
    texts = [*good[:5], "", "\u65e5\u672c", *junk["template"][:2], "!?"]
    long = " ".join(good[:60])  # of the fold of its beginning, which may have been learnt from
    assert len(long) > quality.BEGINNING
    assert quality._fold_of([long]) == quality._fold_of([long[:quality.BEGINNING]])
    scores = filter_.scores(texts)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose([filter_.scores([text])[0] for text in texts], scores, rtol=1e-12)
    quality.save(filter_, str(tmp_path))
    again = quality.load(str(tmp_path))
    np.testing.assert_array_equal(again.scores(texts), scores)
    assert again.threshold == filter_.threshold
