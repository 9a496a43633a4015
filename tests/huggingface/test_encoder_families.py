"""Encoders and encoder-decoders with random weights against transformers.

Logits, gradients, decoding and round trips. Rows are padded, of different lengths, and packed.
Gradients are compared under their names, as an export would write them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed, so nothing is compared with "
                            "it: pip install lmjax[oracle]")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is compared "
                    "with it: pip install lmjax[oracle]")

from config_fuzz import theirs  # noqa: E402
from config_values import BASES, V  # noqa: E402
from hub_twins import (  # noqa: E402
    LENGTHS,
    T,
    as_ours,
    assert_as_on_one_device,
    assert_same_gradients,
    assert_same_logits,
    documents,
    random_model,
)

from lmjax.errors import UserError  # noqa: E402
from lmjax.huggingface.settings import write_settings  # noqa: E402
from lmjax.huggingface.weights import tensor_getter, tensor_shapes  # noqa: E402
from lmjax.sharding import MeshConfig, make_layout, use_layout  # noqa: E402

MORE = 6  # tokens that are generated
ENCODERS = ("distilbert", "electra", "albert")
ENCDECS = ("bart", "mbart", "pegasus", "m2m_100")
NAMES = (*ENCODERS, *ENCDECS)


def cases(*fast, names=NAMES):
    """All names, of which only these run where every second counts."""
    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=pytest.mark.long if name in fast else pytest.mark.slow)
        for name in names])


def settings_of(name):
    return {**BASES[name], "model_type": name}


@functools.cache
def batch_of(name):
    """Rows, with another text for the encoder of an encoder-decoder; and the targets."""
    batch = documents(0, pad=1)
    if name in ENCDECS:
        batch |= {f"encoder_{key}": value for key, value in documents(1, pad=1).items()}
    return batch, np.random.default_rng(2).integers(5, V, (3, T), dtype=np.int32)


@functools.cache
def oracle(name):
    """(their model with random weights, its tensors)."""
    return random_model(settings_of(name))


@functools.cache
def ours(name):
    """(model, parameters, rows of the table) of their tensors."""
    return as_ours(settings_of(name), oracle(name)[1])


def logits_and_gradients(model):
    def run(params, batch, targets):
        """The loss is the mean over the tokens of the padded rows."""
        def mean(params):
            logits = model.logits(params, batch)
            nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
            return jnp.sum((nats * (batch["segment_ids"] > 0))[:2]) / sum(LENGTHS), logits

        (loss, logits), grads = jax.value_and_grad(mean, has_aux=True)(params)
        return logits, loss, grads

    return run


@functools.cache
def computed(name):
    """Our (logits, loss, gradients)."""
    model, params, _ = ours(name)
    return jax.jit(logits_and_gradients(model))(params, *batch_of(name))


def of_theirs(name):
    """Their loss and logits of the padded rows."""
    batch, targets = batch_of(name)
    names = dict(input_ids="tokens", attention_mask="segment_ids")
    if name in ENCDECS:
        names = {key: f"encoder_{value}" for key, value in names.items()} | dict(
            decoder_input_ids="tokens", decoder_attention_mask="segment_ids")
    inputs = {key: torch.tensor(batch[value][:2]).long() for key, value in names.items()}
    logits = oracle(name)[0](**inputs).logits
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(targets[:2]).long().flatten(), reduction="none")
    real = torch.tensor(batch["segment_ids"][:2]).flatten()
    return (nats * real).sum() / sum(LENGTHS), logits


@cases("albert", "electra", "bart", "m2m_100")
def test_logits_loss_and_gradients_are_those_of_transformers(name):
    oracle(name)[0].zero_grad()
    loss, logits = of_theirs(name)
    loss.backward()
    got, our_loss, grads = computed(name)
    assert_same_logits(np.asarray(got), logits.detach().numpy())
    assert float(our_loss) == pytest.approx(loss.item(), rel=1e-5)
    wanted = {key: p.grad.numpy() for key, p in oracle(name)[0].named_parameters()
              if p.grad is not None}
    table = ours(name)[2]
    if "final_logits_bias" in tensor_shapes(grads, table):  # a buffer of theirs
        wanted["final_logits_bias"] = np.asarray(tensor_getter(grads, table)("final_logits_bias"))
    assert_same_gradients(grads, table, wanted)


@cases("bart", "m2m_100", names=ENCDECS)
def test_greedy_decoding_of_a_ragged_batch_gives_their_tokens(name):
    model, params, _ = ours(name)
    tokens, start = documents(1, pad=1)["tokens"], oracle(name)[0].config.decoder_start_token_id
    expected = [oracle(name)[0].generate(
        torch.tensor(tokens[i:i + 1, :n]).long(), do_sample=False, num_beams=1, max_new_tokens=MORE,
        eos_token_id=None, forced_eos_token_id=None)[0, 1:].numpy() for i, n in enumerate(LENGTHS)]

    @jax.jit
    def run(params, batch):
        cache = model.init_cache(2, MORE + 1, params=params, batch=batch)

        def one(carry, _):
            cache, last = carry
            logits, cache = model.step(params, last[:, None], cache)
            last = jnp.argmax(logits, -1)
            return (cache, last), last

        return jax.lax.scan(one, (cache, jnp.full((2,), start, jnp.int32)), length=MORE)[1].T

    batch = {key: value[:2] for key, value in batch_of(name)[0].items() if "encoder" in key}
    np.testing.assert_array_equal(run(params, batch), np.stack(expected))


@cases("distilbert", "electra", "mbart", "pegasus")
def test_a_round_trip_is_bit_exact(name):
    """Tensors come back as they were, and transformers computes the same with our config.json."""
    model, params, table = ours(name)
    logits = theirs(settings_of(name))[1]
    written = write_settings(model.config, name)
    ids = {"pad_token_id": BASES[name]["pad_token_id"]}
    np.testing.assert_array_equal(theirs({**ids, **written})[1], logits)
    get = tensor_getter(params, table)
    stored = {key: tensor for key, tensor in oracle(name)[1].items()
              if "embed_positions" not in key or model.config.positions == "learned"}
    assert tensor_shapes(params, table).keys() == stored.keys()
    for key, tensor in stored.items():
        np.testing.assert_array_equal(get(key), tensor, err_msg=key)


@cases("bert", names=("bert", "modernbert", *NAMES))
def test_a_mesh_computes_what_one_device_does(name):
    model, params, _ = ours(name)
    batch, targets = batch_of(name)
    batch = {key: np.concatenate([value, value[:1]]) for key, value in batch.items()}
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, layout.tree(model.axes, model.shapes))

    @jax.jit
    def run(params, batch):
        with use_layout(layout):
            return logits_and_gradients(model)(
                params, batch, np.concatenate([targets, targets[:1]]))

    assert_as_on_one_device(run(placed, batch), computed(name))


def test_widths_that_a_class_cannot_have_are_not_written():
    """A width of 0 means that of the layers, and ALBERT has a matrix after its embeddings."""
    found = ours("electra")[0].config
    same = dataclasses.replace(found, table_dim=0)
    assert write_settings(same, "electra")["embedding_size"] == found.embed_dim
    with pytest.raises(UserError, match="table_dim"):
        write_settings(dataclasses.replace(same, shared_layers=True), "albert")


@pytest.mark.long
def test_a_discriminator_gives_states_and_no_scores():
    """ELECTRA's small discriminator has narrow embeddings and no head that scores tokens."""
    tensors = {name: x for name, x in oracle("electra")[1].items() if "generator" not in name}
    model, params, _ = as_ours(settings_of("electra"), tensors)
    batch, _ = batch_of("electra")
    states, _ = jax.jit(model.encode)(params, batch)
    expected = oracle("electra")[0].electra(
        torch.tensor(batch["tokens"][:2]).long(),
        attention_mask=torch.tensor(batch["segment_ids"][:2])).last_hidden_state
    assert_same_logits(np.asarray(states), expected.detach().numpy())
    with pytest.raises(UserError, match="expected an MLM head, .*fine-tune the model"):
        model.logits(params, batch)
