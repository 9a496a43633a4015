"""Models trained here read a text as their rows do: in lmjax, in transformers, and imported again.

The models are untrained; what they read and answer is compared.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports import settings_of

import lmjax
from lmjax.data.objectives import Objective
from lmjax.data.rows import START_ID, Pieces
from lmjax.data.tokenizers import HuggingFaceTokenizer, TokenizerConfig, train_tokenizer
from lmjax.decoding.sampling import Sampling
from lmjax.lm import LM
from lmjax.models.model import build_model
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.recipe import build_recipe

transformers = pytest.importorskip(
    "transformers", reason="not installed: pip install lmjax[oracle]")
torch = pytest.importorskip("torch", reason="not installed: pip install lmjax[oracle]")

KNOWN, LENGTH = 300, 48
GREEDY = Sampling(temperature=0.0)
CORPUS = ["Document 7 tells of the number 49.\n", "naïve café\tfor two\n"] * 20
SPANS = {"name": "span_corruption", "sentinels": 16}
# (model, objective, whether the tokenizer is a byte-level one that puts nothing around a text)
FAMILIES = {
    "llama": ({}, {}, False),
    "completep": ({"parametrization": "completep", "base_embed_dim": 6, "base_num_layers": 1,
                   "tie_embeddings": True}, {}, False),
    "gpt2": ({"preset": "gpt2"}, {}, False),
    "byte-level": ({}, {}, True),
    "mistakes": ({}, {"augment": {"share": 0.5, "mask": 0.1}}, False),
    "bert": ({"preset": "bert-base", "pooler": False}, {"name": "masked_lm"}, False),
    "byte-level bert": ({"preset": "bert-base", "pooler": False}, {"name": "masked_lm"}, True),
    "modernbert": ({"preset": "modernbert-base"}, {"name": "masked_lm"}, False),
    "t5": ({"preset": "t5-v1.1-small", "head_dim": 8}, SPANS, False),
    "byte-level t5": ({"preset": "t5-v1.1-small", "head_dim": 8}, SPANS, True),
    "ul2": ({"preset": "t5-v1.1-small", "head_dim": 8}, SPANS | {"name": "ul2"}, False),
    "marian": ({"preset": "transformer-base"}, SPANS, False)}
TEXTS = ["", "a", " The number 49 ", "naïve café — 日本", "two\n\nlines\t", "x" * 20,
         "Document <extra_id_0> tells<extra_id_3> of", "[NLG] of the [MASK] 7.", "  two  spaces"]


@pytest.fixture(scope="module")
def ours():
    return train_tokenizer(TokenizerConfig(vocab_size=KNOWN), CORPUS)


@pytest.fixture(scope="module")
def theirs():
    """Like GPT-2's: one special token, nothing around a text, no token for padding."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=KNOWN, show_progress=False, initial_alphabet=made.pre_tokenizer.alphabet()))
    made.add_special_tokens(["<|end|>"])
    return HuggingFaceTokenizer.from_files({
        "tokenizer.json": made.to_str().encode(),
        "special_tokens_map.json": b'{"eos_token": "<|end|>"}',
        "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}'})


def model_of(tokenizer, keys, objective):
    def recipe_of(vocab_size):
        return build_recipe({
            "model": dict(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, mlp_dim=24,
                          init_std=0.5, embedding_std=0.3, vocab_size=vocab_size) | keys,
            "data": {"seq_len": LENGTH, "objective": objective,
                     "tokenizer": {"vocab_size": tokenizer.vocab_size}}})

    made = Objective(recipe_of(2 * KNOWN).data.objective, seq_len=LENGTH,
                     vocab_size=tokenizer.vocab_size, tokenizer=tokenizer)
    recipe = recipe_of(made.vocab_size)
    model = build_model(recipe.model, vocab_size=0, platform="cpu", dtype=jnp.float32)
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(jax.jit(model.init)(jax.random.key(1)), layout.replicated)
    return LM(model, params, layout, tokenizer, recipe, {"step": 0})


def families(*quick, others=pytest.mark.long):
    return [pytest.param(*row, id=name, marks=() if name in quick else others)
            for name, row in FAMILIES.items()]


@pytest.mark.long
@pytest.mark.parametrize("keys, objective, foreign", families("gpt2", others=pytest.mark.slow))
def test_a_text_is_read_and_answered_the_same_everywhere(keys, objective, foreign, ours, theirs,
                                                         tmp_path):
    lm = model_of(theirs if foreign else ours, keys, objective)
    out = tmp_path / "hf"
    lm.export(out, log=lambda line: None)
    again, outside = lmjax.load(out), transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        ids = lm.reader.ids(text)
        assert outside(text).input_ids == ids == again.reader.ids(text), text
    for role in ("pad", "eos", "bos"):
        assert getattr(outside, f"{role}_token_id") == settings_of(out)[f"{role}_token_id"]
    if "[MASK]" in lm.reader.names.ids:
        assert outside.mask_token_id == lm.tokenizer.vocab_size
    told = json.loads((out / "generation_config.json").read_text())
    told.pop("do_sample")
    assert told.items() <= settings_of(out).items()
    batch = outside(TEXTS, padding=True, return_tensors="pt")
    if lm.model.config.family == "encoder":
        model = transformers.AutoModel.from_pretrained(out).eval()
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()
        np.testing.assert_allclose(lm.embed(TEXTS), expected, atol=1e-5)
        np.testing.assert_allclose(again.embed(TEXTS), expected, atol=1e-5)
    elif "augment" not in objective:  # an untrained model of it may answer with [MASK]
        auto = (transformers.AutoModelForSeq2SeqLM if lm.model.config.family == "encdec"
                else transformers.AutoModelForCausalLM)
        answers = auto.from_pretrained(out).eval().generate(
            **batch, do_sample=False, max_new_tokens=8)
        given = 1 if lm.model.config.family == "encdec" else batch["input_ids"].shape[1]
        eos = lm.tokenizer.eos_id
        expected = [[*row, eos][: [*row, eos].index(eos)] for row in answers[:, given:].tolist()]
        for model in (lm, again):
            prompts = [model.reader.ids(text) for text in TEXTS]
            got = model._generator(model.params, prompts, max_tokens=8, sampling=GREEDY)
            assert got == expected
            for ids in map(model.reader.names.encode, TEXTS):
                assert (model.reader.names.decode(ids)
                        == outside.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("keys, objective, foreign", [
    FAMILIES[name] for name in ("llama", "byte-level", "bert", "byte-level bert")])
def test_a_text_is_read_as_training_reads_it(keys, objective, foreign, ours, theirs):
    tokenizer = theirs if foreign else ours
    lm = model_of(tokenizer, keys, objective)
    made = Objective(lm.recipe.data.objective, seq_len=LENGTH, vocab_size=tokenizer.vocab_size)
    for text in TEXTS[:6]:
        [ids] = tokenizer.encode_batch([text])
        stored = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id])
        count = np.array([len(stored) - made.kind.uncounted])
        pieces = Pieces(stored, np.array([0]), count, np.array([0]), np.array([5], np.uint64))
        row = made.rows(pieces, 1, (tokenizer.bos_id, tokenizer.eos_id))
        seen = row["targets" if objective else "tokens"]  # hidden tokens are in the targets
        assert lm.reader.ids(text) == seen[row["segment_ids"] > 0].tolist()


@pytest.mark.long
def test_a_lone_sentencepiece_model_says_what_stands_around_a_text(tmp_path):
    unigram = train_tokenizer(TokenizerConfig(vocab_size=288, model="unigram"), CORPUS)
    for name in ("bert", "t5"):
        lm, said = model_of(unigram, *FAMILIES[name][:2]), []
        lm.export(tmp_path / name, log=said.append)
        assert not (tmp_path / name / "tokenizer.json").exists()
        assert any("has no names for the" in line for line in said)
        assert lmjax.load(tmp_path / name).reader.ids("a café") == lm.reader.ids("a café")


@pytest.mark.long
def test_a_name_that_the_tokenizer_has_already_is_told(ours, theirs, tmp_path):
    import tokenizers

    made = tokenizers.Tokenizer.from_str(theirs.to_json())
    made.add_special_tokens(["[MASK]"])
    files = dict(theirs.files) | {"tokenizer.json": made.to_str().encode()}
    keys, objective, _ = FAMILIES["bert"]  # and not the tokenizer's id, as in version 0.1.0
    lm, said = model_of(HuggingFaceTokenizer.from_files(files), keys,
                        objective | {"own_ids": False}), []
    lm.export(tmp_path / "hf", log=said.append)
    known = lm.tokenizer.vocab_size
    assert f"reads [MASK] as id {known - 1}" in said[0] and f"trained with {known}" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("offset", [1, 2, 5])
def test_positions_are_counted_from_the_padding_id_of_the_tokenizer(offset, ours, tmp_path):
    """RoBERTa's is 1, which is BOS in our tokenizers; transformers counts by the one it is told."""
    lm = model_of(ours, {"preset": "roberta-base", "pooler": False, "position_offset": offset},
                  {"name": "masked_lm"})
    lm.export(tmp_path / "hf", log=lambda line: None)
    settings = settings_of(tmp_path / "hf")
    assert settings["pad_token_id"] == ours.pad_id == 0
    ids = lm.reader.ids("Document 7 tells")
    assert ids[0] == 1
    model = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        theirs = model(torch.tensor([ids, [*ids[:4], *[0] * (len(ids) - 4)]]),
                       attention_mask=torch.tensor([[1] * len(ids), [1] * 4 + [0] * (len(ids) - 4)])
                       ).logits.numpy()
    np.testing.assert_allclose(lm.logits(np.array([ids])), theirs[:1, :, :KNOWN + 1], atol=1e-4)
    np.testing.assert_allclose(lm.logits(np.array([ids[:4]])), theirs[1:, :4, :KNOWN + 1],
                               atol=1e-4)
    again = lmjax.load(tmp_path / "hf")
    np.testing.assert_allclose(again.logits(np.array([ids])), lm.logits(np.array([ids])), atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("config, generation", [
    ({"eos_token_id": [2, 5]}, None), ({}, None),
    ({"eos_token_id": 2}, {"eos_token_id": [2, 7]})])
def test_an_import_is_exported_with_the_special_ids_that_it_had(config, generation, ours,
                                                                tmp_path):
    model_of(ours, {}, {}).export(tmp_path / "first", log=lambda line: None)
    told = {key: value for key, value in settings_of(tmp_path / "first").items()
            if not key.endswith("_token_id")} | config
    (tmp_path / "first" / "config.json").write_text(json.dumps(told))
    file = tmp_path / "first" / "generation_config.json"
    file.unlink()
    if generation:
        file.write_text(json.dumps(generation))
    lmjax.load(tmp_path / "first").export(tmp_path / "second", log=lambda line: None)
    again = tmp_path / "second" / "generation_config.json"
    assert (json.loads(again.read_text()) if again.exists() else None) == generation
    found = {key: value for key, value in settings_of(tmp_path / "second").items()
             if key.endswith("_token_id")}
    assert found == config
    assert START_ID not in found.values()
