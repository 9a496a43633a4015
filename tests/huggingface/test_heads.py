"""Models with the head of a task, in and out of Hugging Face directories, as transformers has them.
"""

import copy
import functools
import json
import shutil

import numpy as np
import pytest
from classifiers import make, sentence
from tiny_settings import COMMON, DISTILBERT, EXPERTS, GEMMA, GPT2, LLAMA, MODERNBERT, ROBERTA, T5

import lmjax
from lmjax.cli.main import main
from lmjax.errors import UserError

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
LABELS = {0: "dull", 1: "fine", 2: "great"}
THREE = dict(id2label=LABELS, label2id={name: i for i, name in LABELS.items()})
SEQUENCE, TOKENS, ANSWERS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
PAD = dict(pad_token_id=0)
# name -> (the beginning of the classes' names, settings, the kinds of heads)
ALL = (SEQUENCE, TOKENS, ANSWERS)
MODELS = {
    "bert": ("Bert", COMMON, ALL),
    "distilbert": ("DistilBert", DISTILBERT, ALL),
    "electra": ("Electra", COMMON | dict(embedding_size=16), ALL),
    "albert": ("Albert", COMMON | dict(embedding_size=16), ALL),
    "roberta": ("Roberta", ROBERTA, ALL),
    "xlm-roberta": ("XLMRoberta", ROBERTA, ALL),
    "camembert": ("Camembert", ROBERTA, ALL),
    "modernbert": ("ModernBert", MODERNBERT | dict(classifier_activation="relu"), ALL),
    "llama": ("Llama", LLAMA | PAD, ALL),
    "mistral": ("Mistral", LLAMA | PAD | dict(sliding_window=4), ALL),
    "qwen2": ("Qwen2", LLAMA | PAD, ALL),
    "qwen3": ("Qwen3", LLAMA | PAD | dict(head_dim=16), ALL),
    "gemma": ("Gemma", LLAMA | PAD | dict(head_dim=16, tie_word_embeddings=True), ALL[:2]),
    "gemma2": ("Gemma2", GEMMA | PAD | dict(final_logit_softcapping=0.1), ALL[:2]),
    "gemma3": ("Gemma3Text", GEMMA | PAD, ALL[:1]),
    "phi3": ("Phi3", LLAMA | PAD, ALL[:2]),
    "mixtral": ("Mixtral", LLAMA | PAD | dict(num_local_experts=4, num_experts_per_tok=2), ALL),
    "qwen3-moe": ("Qwen3Moe", LLAMA | PAD | EXPERTS | dict(head_dim=16), ALL),
    "qwen2-moe": ("Qwen2Moe", LLAMA | PAD | EXPERTS | dict(shared_expert_intermediate_size=40),
                  ALL),
    "gpt2": ("GPT2", GPT2 | PAD, ALL),
}
QUICK = (("llama", SEQUENCE),)
# The classes for tags and answers of some models: those of the others are like these.
LIKE = {TOKENS: ("bert", "electra", "modernbert", "llama", "gpt2"),
        ANSWERS: ("roberta", "distilbert", "modernbert", "llama", "mistral", "qwen3-moe", "gpt2")}
LONG = [(name, SEQUENCE) for name in (
    "bert", "distilbert", "modernbert", "gemma2", "qwen3-moe", "gpt2")] + [
    ("bert", TOKENS), ("gpt2", TOKENS), ("roberta", ANSWERS), ("llama", ANSWERS)]
CASES = [pytest.param(name, head, marks=[] if (name, head) in QUICK else
                      pytest.mark.long if (name, head) in LONG else pytest.mark.slow)
         for name, (_, _, heads) in MODELS.items() for head in heads
         if name in LIKE.get(head, MODELS)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(name, head, further settings) -> (a directory that transformers wrote, the model)."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")

    @functools.cache
    def make(name, head, **more):
        torch.manual_seed(0)
        stem, settings, _ = MODELS[name]
        # A copy: transformers writes into nested settings.
        settings = copy.deepcopy(settings | (THREE if head != ANSWERS else {})) | more
        settings = {key: value for key, value in settings.items() if value is not None}
        cls = getattr(transformers, stem + head)
        model = cls(cls.config_class(**settings)).eval()
        for parameter in model.parameters():  # biases and norms of new models are all alike
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        return path, model

    return make


def theirs(model, tokens):
    """The logits of transformers [B, T, C], those of a classification [B, C]."""
    import torch
    with torch.no_grad():
        out = model(torch.tensor(tokens))
    if hasattr(out, "start_logits"):
        return np.stack([out.start_logits.numpy(), out.end_logits.numpy()], axis=-1)
    return out.logits.numpy()


def ours(lm, tokens, head):
    logits = np.asarray(lm.logits(tokens))
    if head == SEQUENCE:
        return logits[:, -1 if lm.model.config.family == "decoder" else 0]
    return logits


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(3, 90, (2, 9))


@pytest.mark.parametrize(("name", "head"), CASES)
def test_logits_are_those_of_transformers_in_and_out(name, head, saved, tokens, tmp_path):
    path, model = saved(name, head)
    lm = lmjax.load(path)
    expected = theirs(model, tokens)
    np.testing.assert_allclose(ours(lm, tokens, head), expected, atol=1e-4)
    assert np.ptp(expected) > 0.1
    if head == ANSWERS and lm.model.config.family == "decoder":
        with pytest.raises(UserError, match="a model that was trained for a task"):
            lm.predict([])
        with pytest.raises(UserError, match="got the task of another head"):
            lm.export(tmp_path / "out")
        return
    task = lm.recipe.task
    assert task.name == {SEQUENCE: "classification", TOKENS: "tagging"}.get(head, "questions")
    assert (lm.about["task"] == {"unanswerable": True}) == (head == ANSWERS)
    assert getattr(task, "kind", "single") == "single"
    assert getattr(task, "labels", tuple(LABELS.values())) == tuple(LABELS.values())
    lm.export(tmp_path / "out", log=lambda line: None)
    again, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert head == ANSWERS or again.config.id2label == LABELS
    np.testing.assert_allclose(theirs(again.eval(), tokens), expected, atol=1e-4)
    assert lmjax.load(tmp_path / "out").recipe.task == task


def change(path, out, **settings):
    """A copy of a directory with other settings."""
    shutil.copytree(path, out)
    told = json.loads((out / "config.json").read_text()) | settings
    (out / "config.json").write_text(json.dumps(
        {key: value for key, value in told.items() if value is not None}))
    return out


@pytest.mark.parametrize(("settings", "said"), [
    (dict(problem_type="single_label_classification", id2label={"0": "a"}), "one label for a regr"),
    (dict(problem_type="regression"), "one label for a regression.*got 3 with problem_type=regr"),
    (dict(problem_type="other"), "problem_type to be one of single_label_classification"),
    (dict(id2label={"0": "a", "2": "b", "3": "c"}), "id2label with a name for each of 0, 1"),
    (dict(id2label={"0": "a", "1": "a", "2": "b"}), "different labels in id2label"),
    (dict(num_labels=5), "num_labels=3, as id2label says, got 5"),
    (dict(id2label={"0": "a", "1": "b"}), r"tensor classifier\.\w+ \[2.*got \[3"),
    (dict(architectures=["BertForMultipleChoice"]), "only tensors that the model has, got class"),
    (dict(architectures=["DistilBertForSequenceClassification"]), "a class that lmjax computes"),
    (dict(model_type="deberta"), "model_type to be one of"),
])
def test_labels_that_contradict_are_refused_in_one_line(settings, said, saved, tmp_path):
    path, _ = saved("bert", SEQUENCE)
    with pytest.raises(UserError, match=said):
        lmjax.load(change(path, tmp_path / "out", **settings))


@pytest.mark.long
def test_a_mean_over_tokens_and_an_encoder_decoder_with_a_head_are_refused(saved, tmp_path):
    import transformers

    path, _ = saved("modernbert", SEQUENCE)
    with pytest.raises(UserError, match="classifier_pooling='cls', got 'mean', which lmjax cannot"):
        lmjax.load(change(path, tmp_path / "mean", classifier_pooling="mean"))
    model = transformers.T5ForSequenceClassification(transformers.T5Config(**T5))
    model.save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="a class that lmjax computes.*got T5ForSequenceClass"):
        lmjax.load(tmp_path / "t5")


@pytest.mark.long
@pytest.mark.parametrize(("settings", "kind", "labels"), [
    (dict(id2label=None, label2id=None, num_labels=1), "regression", ()),
    (dict(id2label=None, label2id=None, num_labels=2), "single", ("LABEL_0", "LABEL_1")),
    (dict(problem_type="multi_label_classification", id2label=LABELS), "multi",
     tuple(LABELS.values())),
])
def test_the_kind_of_a_classification_is_that_of_config_json(settings, kind, labels, saved,
                                                            tmp_path):
    outputs = max(len(labels), 1)
    path, model = saved("bert", SEQUENCE, num_labels=outputs, id2label=None, label2id=None)
    lm = lmjax.load(change(path, tmp_path / "in", **settings))
    assert (lm.recipe.task.kind, lm.recipe.task.labels) == (kind, labels)
    assert lm.model.config.head.outputs == outputs and lm.model.config.head.dropout == 0.1
    lm.export(tmp_path / "out", log=lambda line: None)
    again = type(model).from_pretrained(tmp_path / "out").config
    assert again.problem_type == {"single": "single_label_classification", "multi":
                                  "multi_label_classification"}.get(kind, kind)
    assert again.num_labels == outputs and again.id2label == (
        dict(enumerate(labels)) or {0: "LABEL_0"})


def test_id2label_decides_over_label2id_and_a_line_says_so(saved, tmp_path, capsys):
    path, _ = saved("bert", SEQUENCE)
    lm = lmjax.load(change(path, tmp_path / "in", label2id={"a": 0, "b": 1, "c": 2}))
    assert lm.recipe.task.labels == tuple(LABELS.values())
    assert "id2label decides over label2id, which names other labels" in capsys.readouterr().err


ROBERTA = {"token_types": 1, "position_offset": 1, "max_positions": 64}


@pytest.mark.parametrize(("family", "task"), [
    pytest.param("encoder", {}, marks=pytest.mark.slow),
    pytest.param("encoder", {"pair": "{other}"}, marks=pytest.mark.long),
    pytest.param("encoder", {"pair": "{other}", "model": ROBERTA}, marks=pytest.mark.slow),
    pytest.param("encoder", {"kind": "multi"}, marks=pytest.mark.slow),
    pytest.param("decoder", {}, marks=pytest.mark.slow),
    pytest.param("decoder", {"kind": "regression"}, marks=pytest.mark.long)])
def test_a_pipeline_on_an_export_gives_the_same_labels_and_scores(family, task, tmp_path):
    pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    lm = make(tmp_path / "run", family, **task)
    assert main(["export-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    classify = transformers.pipeline("text-classification", str(tmp_path / "hf"), top_k=None)
    texts, seconds = [sentence(i) for i in range(5)], None
    inputs = texts
    if "pair" in task:
        seconds = [sentence(9 - i) for i in range(5)]
        inputs = [{"text": a, "text_pair": b} for a, b in zip(texts, seconds, strict=True)]
    found, imported = classify(inputs, batch_size=5), lmjax.load(tmp_path / "hf")
    for theirs, ours, again in zip(found, lm.classify(texts, seconds),
                                   imported.classify(texts, seconds), strict=True):
        scores = {each["label"]: each["score"] for each in theirs}
        expected = {"LABEL_0": ours["value"]} if "value" in ours else ours["probabilities"]
        assert scores == pytest.approx(expected, abs=1e-4)
        assert again.keys() == ours.keys() and again.get("label") == ours.get("label")
        assert again.get("probabilities", {}) == pytest.approx(
            ours.get("probabilities", {}), abs=1e-5)


@pytest.mark.long
def test_a_head_that_transformers_does_not_have_is_not_exported(tmp_path):
    make(tmp_path / "run", head_kind="linear")
    with pytest.raises(UserError, match="bert .which cannot express.*head.*linear"):
        lmjax.load(tmp_path / "run").export(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
