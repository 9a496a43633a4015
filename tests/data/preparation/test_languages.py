"""English, Chinese and Japanese go through every stage: openings of books without copyright."""

import json

import numpy as np

from lmjax.data import store
from lmjax.data.config import CurateConfig, DataConfig, DecontaminateConfig, DedupConfig
from lmjax.data.preparation.prepare import prepare
from lmjax.data.text.filters import FineWeb, GopherQuality, GopherRepetition
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import TokenizerConfig, prepared_tokenizer

BOOKS = {
    "en": [
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of "
        "having nothing to do.\n"
        "Once or twice she had peeped into the book her sister was reading, but it had no "
        "pictures or conversations in it.\n"
        '"And what is the use of a book," thought Alice, "without pictures or conversations?" So '
        "she was considering in her\n"
        "own mind whether the pleasure of making a daisy-chain would be worth the trouble of "
        "getting up and picking them.",
        "It is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in\n"
        "want of a wife. However little known the feelings or views of such a man may be on his "
        "first entering a\n"
        "neighbourhood, this truth is so well fixed in the minds of the surrounding families, "
        "that he is considered the\n"
        "rightful property of some one or other of their daughters."],
    "zh": ["""子曰：「學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？人不知而不慍，不亦君子乎？」
有子曰：「其為人也孝弟，而好犯上者，鮮矣；不好犯上，而好作亂者，未之有也。君子務本，本立而道生。」
曾子曰：「吾日三省吾身：為人謀而不忠乎？與朋友交而不信乎？傳不習乎？」
子曰：「弟子入則孝，出則弟，謹而信，汎愛眾，而親仁。行有餘力，則以學文。」""",
           """道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。故常無欲，以觀其妙；常有欲，以觀其徼。
天下皆知美之為美，斯惡已。皆知善之為善，斯不善已。有無相生，難易相成，長短相形，高下相傾，音聲相和，前後相隨。"""],
    "ja": ["""吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。
何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。吾輩はここで始めて人間というものを見た。
しかもあとで聞くとそれは書生という人間中で一番獰悪な種族であったそうだ。この書生というのは時々我々を捕えて煮て食うという話である。
しかしその当時は何という考もなかったから別段恐しいとも思わなかった。""",
           """親譲りの無鉄砲で小供の時から損ばかりしている。小学校に居る時分学校の二階から飛び降りて一週間ほど腰を抜かした事がある。
なぜそんな無闇をしたと聞く人があるかも知れぬ。別段深い理由でもない。新築の二階から首を出していたら、同級生の一人が冗談に囃したからである。"""],
}
PAGE = {"en": "Skip to main content", "zh": "版權所有 某某書局", "ja": "本書の無断転載を禁じます"}


def test_every_stage_works_on_each_language(tmp_path):
    for folder in ("texts", "evals"):
        (tmp_path / folder).mkdir()
    for code, (kept, known) in BOOKS.items():
        (tmp_path / f"texts/{code}-0.txt").write_text(f"{PAGE[code]}\n{kept}\n")
        (tmp_path / f"texts/{code}-1.txt").write_text(f"{kept}\n")  # equal without the page's line
        (tmp_path / f"texts/{code}-2.txt").write_text(f"{kept} {known.split()[0][:4]}\n")
        (tmp_path / f"texts/{code}-3.txt").write_text(f"{known}\n")
        (tmp_path / f"texts/{code}-4.txt").write_text("\n".join([kept[:20]] * 12))
        (tmp_path / f"evals/{code}.txt").write_text(known[30:150])
    evals = DecontaminateConfig(sources=(SourceConfig("e", f"text:{tmp_path}/evals/*"),))
    curate = CurateConfig(
        workers=1, languages=tuple(BOOKS), gopher_quality=GopherQuality(),
        gopher_repetition=GopherRepetition(), fineweb=FineWeb(), dedup=DedupConfig(threshold=0.8),
        decontaminate=evals)
    config = DataConfig(
        sources=(SourceConfig("s", f"text:{tmp_path}/texts/*"),), curate=curate, seq_len=32,
        tokenizer=TokenizerConfig(vocab_size=640), clean=("newlines", "nfc", "boilerplate"))
    out = prepare(config, str(tmp_path / "out"), log=lambda line: None)
    entry, tokenizer, found = store.read_manifest(out)["sources"]["s"], prepared_tokenizer(out), {}
    for split in ("train", "heldout"):
        part = store.SplitStore(out, "s", split, entry[split])
        found |= {name: tokenizer.decode(ids) for name, ids in
                  zip(part.ids, np.split(part.tokens(), part.offsets[1:-1]), strict=True)}
    assert found == {f"{code}-0.txt": f"{kept}\n" for code, (kept, _) in BOOKS.items()}
    gone = entry["removed"]
    assert (gone.pop("exact_copy"), gone.pop("near_copy"), gone.pop("contaminated")) == (3, 3, 3)
    assert sum(gone.values()) == 3  # the texts that repeat one line
    assert entry["changed"] == {"boilerplate": 3}
    receipt = json.loads((tmp_path / "out/receipts/9-tokens.json").read_text())
    facts = receipt["facts"]["fertility"]
    assert set(facts) == {"s en", "s zh", "s ja"}
    # In Chinese, a character is a word.
    assert facts["s zh"]["words"] == sum(c.isalpha() for c in BOOKS["zh"][0])
