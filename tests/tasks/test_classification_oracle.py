"""A step of classification is that of transformers and torch's AdamW; packing changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classifiers import LABELS, sentence, tokenizer
from tiny_settings import COMMON, LLAMA

import lmjax
from lmjax.data.config import DataConfig
from lmjax.data.reading import make_reader
from lmjax.huggingface.settings import model_type_of
from lmjax.huggingface.stored import rows_for
from lmjax.huggingface.weights import tensor_getter, tensor_shapes
from lmjax.sharding import MeshConfig, make_layout
from lmjax.tasks.classification import Classification
from lmjax.tasks.task import Sizes
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.table import make_optimizer
from lmjax.training.state import state_spec
from lmjax.training.step import make_train_step

pytestmark = pytest.mark.long

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
# AdamW divides a gradient by its size: a larger epsilon keeps the rounding of zeros small.
RATE, EPSILON, WEIGHTS = 1e-2, 1e-4, {"dull": 0.5, "great": 3.0}
CASES = {"single": {}, "pair": {"pair": "{other}"}, "weights": {"class_weights": WEIGHTS},
         "multi": {"kind": "multi"}, "regression": {"kind": "regression"}}
LONG = [("encoder", "pair"), ("encoder", "regression"), ("decoder", "multi")]
TRUTHS = {"multi": [["dull"], [], ["fine", "great"], ["great"]], "regression": [0.5, -1, 3, 0.0]}


def examples(case, family):
    """The encoded examples, the task and its facts."""
    task = Classification(head_dropout=0.0, **CASES[case])
    truths = TRUTHS.get(case, ["dull", "great", "fine", "great"])
    records = [{"text": sentence(i), "other": sentence(9 - i), "label": truth}
               for i, truth in enumerate(truths)]
    facts = {} if case == "regression" else {"labels": LABELS, "counts": [1, 1, 2]}
    reader = make_reader(tokenizer(), family, DataConfig(), {})
    encoded = [task.encode(record, reader, facts, Sizes(40)).columns for record in records]
    return encoded, task, facts


def rows(encoded, per_row):
    """A batch with so many examples in each row."""
    length = per_row * max(len(columns["tokens"]) for columns in encoded)
    batch = {}
    for row in range(len(encoded) // per_row):
        at = 0
        for number, columns in enumerate(encoded[row * per_row : (row + 1) * per_row], 1):
            n = len(columns["tokens"])
            more = {"positions": np.arange(n), "segment_ids": np.full(n, number)}
            for name, values in {**columns, **more}.items():
                whole = name == "label_values"
                dtype = np.float32 if name.endswith(("values", "loss_mask")) else np.int32
                out = batch.setdefault(name, np.zeros(
                    (len(encoded) // per_row, len(values) if whole else length), dtype))
                out[row, 0 if whole else at :][: len(values)] = values
            at += n
    return {name: jnp.asarray(values) for name, values in batch.items()}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(family, outputs) -> transformers' model and ours, with the same weights."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")

    def make(family, outputs):
        torch.manual_seed(0)
        stem, settings = {"encoder": ("Bert", COMMON | dict(
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
            "decoder": ("Llama", LLAMA | dict(pad_token_id=0))}[family]
        cls = getattr(transformers, f"{stem}ForSequenceClassification")
        model = cls(cls.config_class(**settings | dict(vocab_size=304, num_labels=outputs)))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
        path = tmp_path_factory.mktemp(family)
        model.save_pretrained(path)
        return model.train(), lmjax.load(path)

    return make


def their_loss(model, encoded, case, facts):
    """The loss of transformers, one example per row."""
    import torch
    from torch.nn import functional

    length = max(len(columns["tokens"]) for columns in encoded)

    def padded(values):
        return torch.tensor(np.stack([np.pad(x, (0, length - len(x))) for x in values])).long()

    inputs = {"input_ids": padded([columns["tokens"] for columns in encoded]),
              "attention_mask": padded([np.ones(len(columns["tokens"])) for columns in encoded])}
    if case == "pair":
        inputs["token_type_ids"] = padded([columns["token_types"] for columns in encoded])
        assert inputs["token_type_ids"].max() == 1
    if case == "multi":
        labels = torch.tensor(np.stack([columns["label_values"] for columns in encoded]))
    elif case == "regression":
        labels = torch.tensor([columns["values"].sum() for columns in encoded])
    else:
        labels = torch.tensor([columns["targets"].sum() for columns in encoded]).long()
    if case == "weights":
        weight = torch.tensor([WEIGHTS.get(label, 1.0) for label in facts["labels"]])
        return functional.cross_entropy(model(**inputs).logits, labels, weight=weight)
    return model(**inputs, labels=labels).loss


@pytest.mark.parametrize(("family", "case"), [
    pytest.param(family, case, marks=() if (family, case) in LONG else pytest.mark.slow)
    for family in ("encoder", "decoder") for case in CASES
    if (family, case) != ("decoder", "pair")])
def test_a_step_is_that_of_transformers(family, case, imported):
    import torch

    encoded, task, facts = examples(case, family)
    theirs, lm = imported(family, len(facts.get("labels", [0])))
    model, batch = lm.model, rows(encoded, 1)
    loss_fn = task.loss(model, facts)
    table = rows_for(model_type_of(lm.about["huggingface"]["settings"], "config.json"),
                     model.config)

    def named(params):
        get = tensor_getter(params, table)
        return {name: get(name) for name in tensor_shapes(model.shapes, table)}

    def mean(params, batch=batch):
        loss = loss_fn(params, batch, jax.random.key(0))
        return loss.total / loss.weight

    loss, gradients = jax.jit(jax.value_and_grad(mean))(lm.params)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, betas=(0.9, 0.95), eps=EPSILON,
                                  weight_decay=0.0)
    wanted = their_loss(theirs, encoded, case, facts)
    wanted.backward()
    optimizer.step()
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
    config = OptimizerConfig(peak_lr=RATE, schedule="constant", warmup_steps=0, clip_norm=0.0,
                             weight_decay=0.0, eps=EPSILON)
    spec = state_spec(model, make_optimizer(config, 9, model.axes), layout, ema=False)
    step = make_train_step(loss_fn, spec, layout, lambda step: RATE, seed=0)
    state, metrics = step(spec.start(jax.device_put(lm.params, layout.replicated), 0), batch)
    assert float(metrics["loss"]) == pytest.approx(wanted.item(), rel=1e-4)
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-4)
    got, after = named(gradients), named(state.params)
    assert got.keys() == {name for name, _ in theirs.named_parameters()}
    for name, p in theirs.named_parameters():
        np.testing.assert_allclose(got[name], p.grad, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(after[name], p.detach(), atol=1e-4, err_msg=name)
    if task.packs:
        packed, same = jax.jit(jax.value_and_grad(mean))(lm.params, rows(encoded, 2))
        assert float(packed) == pytest.approx(float(loss), rel=1e-5)
        for name, gradient in named(same).items():
            np.testing.assert_allclose(gradient, got[name], atol=1e-5, err_msg=name)
