"""The losses and gradients of preferences and GRPO are those of TRL, on the same rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import huggingface
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.tasks.grpo import Grpo, advantages, answered_rows
from lmjax.tasks.preferences import Preferences

# What TRL and its packages warn of is theirs.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

CONFIG = DecoderConfig(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, vocab_size=64,
                       init_std=0.3)
BETA, LENGTH, MOST = 0.3, 12, 6  # LENGTH tokens in a row, of which MOST are written
FIELDS = {**dict.fromkeys(("tokens", "targets", "loss_mask", "positions", "segment_ids", "values"),
                          LENGTH), "label_values": 1}


@pytest.fixture(scope="module")
def trl():
    missing = "is not installed, so nothing is compared with it: pip install trl"
    pytest.importorskip("torch", reason=f"torch {missing}")
    return pytest.importorskip("trl", reason=f"trl {missing}")


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, vocab_size=0, platform="cpu", dtype=jnp.float32)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(1))


@pytest.fixture
def theirs(trl, model, params, tmp_path):
    """The model in transformers, and a function from its gradients to our tree of parameters."""
    import torch
    import transformers

    huggingface.write_directory(tmp_path / "a", model, params, None, log=lambda line: None)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()

    def gradients():
        with torch.no_grad():  # the weights become the gradient, and are read as weights are
            for parameter in found.parameters():
                parameter.copy_(parameter.grad)
        found.save_pretrained(tmp_path / "b")
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return huggingface.read_params(huggingface.read_directory(tmp_path / "b"), model,
                                       jax.tree.map(lambda _: one, model.shapes))

    return found, gradients


def assert_equal(loss_fn, params, batch, loss, gradients):
    """Our loss and gradient equal those of TRL, to 1e-5 of their size."""
    def mean(params):
        ours = loss_fn(params, batch, None)
        return ours.total / ours.weight

    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
    loss.backward()
    for ours, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradients()), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5 * max(1, float(jnp.abs(other).max())))


def trainer_of(cls, config, theirs, tmp_path, columns, **more):
    """A trainer of TRL around the model; its data and its tokenizer only have to be there."""
    import tokenizers
    import transformers

    datasets = pytest.importorskip("datasets")  # which comes with TRL
    words = {f"w{i}": i for i in range(CONFIG.vocab_size)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w0")
    return cls(theirs, args=config(str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False,
                                   **more.pop("settings")),
               train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer,
               **more)


def preferred(same_length=False):
    """Ids: [(prompt, chosen, rejected), ...]; on request with 1 and 5 tokens in the first two."""
    rng = np.random.default_rng(0)

    def ids(least, most):
        return rng.integers(3, 64, rng.integers(least, most + 1)).tolist()

    return [(ids(1, 1), ids(5, 5), ids(1, 6)) if same_length else (ids(1, 4), ids(1, 6), ids(1, 6))
            for _ in range(5)]


def both_rows(found, reference):
    """Our batch of both answers."""
    zeros = np.zeros(len(found), np.float32)
    sides = {prefix: answered_rows(FIELDS, [row[0] for row in found], [row[at] for row in found],
                                   zeros, zeros) for prefix, at in (("", 1), ("rejected_", 2))}
    batch = {f"{prefix}{name}": rows[name] for prefix, rows in sides.items()
             for name in ("tokens", "targets", "loss_mask", "positions", "segment_ids")}
    return batch | {"label_values": reference}


def padded(rows, fill=0):
    import torch

    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


@pytest.mark.parametrize(("kind", "theirs_name"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo_are_those_of_trl(kind, theirs_name, trl, model, params, theirs, tmp_path):
    import torch

    found = preferred()
    reference = np.random.default_rng(1).normal(-20, 3, (len(found), 2)).astype(np.float32)
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig, theirs[0], tmp_path, {
        "prompt": ["w5"], "chosen": ["w6"], "rejected": ["w7"]},
        settings={"loss_type": [theirs_name], "beta": BETA})
    trainer.model.eval()
    trainer.precompute_ref_logps = True
    both = [(row[0], row[at]) for at in (1, 2) for row in found]
    loss = trainer._compute_loss(trainer.model, {
        "input_ids": padded([[*prompt, *answer] for prompt, answer in both]),
        "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in both]),
        "completion_mask": padded([[0] * len(prompt) + [1] * len(answer)
                                   for prompt, answer in both]),
        "ref_chosen_logps": torch.tensor(reference[:, 0]),
        "ref_rejected_logps": torch.tensor(reference[:, 1])}, False)
    assert_equal(Preferences(kind=kind, beta=BETA).loss(model, {}), params,
                 both_rows(found, reference), loss, theirs[1])


@pytest.mark.parametrize("same_length", [True, False])
def test_orpo_is_that_of_trl(same_length, trl, model, params, theirs, tmp_path):
    """The term of the odds always is; the likelihoods are, where the two means are the same.

    TRL takes the mean over the tokens of all better answers and of their prompts. Ours is that of
    the paper (arXiv:2403.07691, equations 1 and 6): the mean over pairs of the mean over the tokens
    of an answer. With prompts of one token and answers of one length, the two are the same.
    """
    orpo = pytest.importorskip("trl.experimental.orpo")
    found = preferred(same_length)
    batch = {}
    trainer = trainer_of(orpo.ORPOTrainer, orpo.ORPOConfig, theirs[0], tmp_path, {
        "prompt": ["w5"], "chosen": ["w6"], "rejected": ["w7"]}, settings={"beta": BETA})
    trainer.model.eval()
    for side, at in (("chosen", 1), ("rejected", 2)):
        whole = [(row[0], row[at]) for row in found]
        batch[f"{side}_input_ids"] = padded([prompt + answer for prompt, answer in whole])
        batch[f"{side}_attention_mask"] = padded([[1] * len(prompt + answer)
                                                  for prompt, answer in whole])
        batch[f"{side}_labels"] = padded([[-100] * len(prompt) + answer
                                          for prompt, answer in whole], -100)
    if same_length:
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    else:
        chosen, rejected = trainer.concatenated_forward(trainer.model, batch)[:2]
        loss = -(chosen + trainer.odds_ratio_loss(chosen, rejected)[0]).mean()
    reference = np.zeros((len(found), 2), np.float32)
    assert_equal(Preferences(kind="orpo", beta=BETA).loss(model, {}), params,
                 both_rows(found, reference), loss, theirs[1])


@pytest.mark.parametrize(("kind", "temperature"), [
    ("grpo", 1.0), ("grpo", 0.6), ("dapo", 1.0), ("dr_grpo", 1.0)])
def test_grpo_is_that_of_trl(kind, temperature, trl, model, params, theirs, tmp_path):
    import torch

    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 64, 1 + i // 4).tolist() for i in range(8)]
    answers = [rng.integers(3, 64, 1 + i % MOST).tolist() for i in range(8)]
    rewards = rng.integers(0, 3, 8).astype(np.float32)
    trainer = trainer_of(
        trl.GRPOTrainer, trl.GRPOConfig, theirs[0], tmp_path, {"prompt": ["w5", "w6"]},
        reward_funcs=lambda completions, **_: rewards.tolist(), settings={
            "loss_type": kind, "beta": 0.0, "temperature": temperature, "num_generations": 4,
            "max_completion_length": MOST, "per_device_train_batch_size": 8,
            "scale_rewards": "none" if kind == "dr_grpo" else "group"})
    trainer.model.eval()
    centred = torch.tensor(rewards).reshape(2, 4)
    centred = centred - centred.mean(dim=1, keepdim=True)
    spread = 1.0 if kind == "dr_grpo" else centred.std(dim=1, keepdim=True) + 1e-4
    left = [[0] * (2 - len(prompt)) + prompt for prompt in prompts]
    loss = trainer._compute_loss(trainer.model, {
        "prompt_ids": torch.tensor(left),
        "prompt_mask": torch.tensor([[0] * (2 - len(prompt)) + [1] * len(prompt)
                                     for prompt in prompts]),
        "completion_ids": padded(answers),
        "completion_mask": padded([[1] * len(answer) for answer in answers]),
        "advantages": (centred / spread).reshape(-1),
        "num_items_in_batch": torch.tensor(sum(map(len, answers)))})
    gains = advantages(rewards.reshape(2, 4), kind).reshape(-1)
    task = Grpo(input="{q}", target="{a}", max_tokens=MOST, kind=kind, temperature=temperature)
    assert_equal(task.loss(model, {}), params,
                 answered_rows(FIELDS, prompts, answers, gains, rewards), loss, theirs[1])
