"""Decoders with random weights against transformers: logits, gradients, decoding and round trips.

Rows are padded, of different lengths, and packed. Gradients are compared under their names, as an
export would write them.
"""

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

from lmjax.huggingface.settings import write_settings  # noqa: E402
from lmjax.huggingface.weights import tensor_getter, tensor_shapes  # noqa: E402
from lmjax.sharding import MeshConfig, make_layout, use_layout  # noqa: E402
from lmjax.tasks.losses import next_token_loss  # noqa: E402

MORE = 6  # tokens that are generated
# Name -> (model type, changes of its base). Without one: the base itself.
VARIANTS = {
    "stablelm-plain": ("stablelm", dict(use_parallel_residual=False, qk_layernorm=False)),
    "neox-in-turn": ("gpt_neox", dict(use_parallel_residual=False, rotary_pct=1.0)),
    "phi-normed": ("phi", dict(qk_layernorm=True)),
    "falcon-7b": ("falcon", dict(new_decoder_architecture=False, num_kv_heads=None)),
    "falcon-11b": ("falcon", dict(num_ln_in_parallel_attn=1)),
    "falcon-old": ("falcon", dict(new_decoder_architecture=False, multi_query=False, bias=True,
                                  num_kv_heads=4, parallel_attn=False)),
    "opt-post": ("opt", dict(do_layer_norm_before=False)),
    "smollm3-window": ("smollm3", dict(use_sliding_window=True, sliding_window=4)),
    "cohere-plain": ("cohere", dict(use_qk_norm=False, attention_bias=True)),
    "gpt-oss-plain": ("gpt_oss", dict(rope_scaling={"rope_type": "default"}, attention_bias=False,
                                      num_experts_per_tok=3)),
    "deepseek-v2-lite": ("deepseek_v2", dict(
        topk_method="greedy", q_lora_rank=None, first_k_dense_replace=0, rope_scaling=None)),
    "deepseek-v3-biased": ("deepseek_v3", dict(
        attention_bias=True, first_k_dense_replace=2, num_hidden_layers=3, norm_topk_prob=False)),
    "deepseek-v3-ungrouped": ("deepseek_v3", dict(n_group=1, topk_group=1)),
    "phi3-partial": ("phi3", dict(partial_rotary_factor=0.5))}
NAMES = ("olmo", "olmo2", "olmo3", "smollm3", "ministral", "starcoder2", "stablelm", "cohere",
         "cohere2", "glm", "glm4", "deepseek_v2", "deepseek_v3", "gpt_oss", "gpt_neox", "gptj",
         "phi", "falcon", "opt", *VARIANTS)
PATTERNS = ("olmo3", "smollm3", "smollm3-window", "cohere2", "ministral")  # layers of two kinds


def cases(*fast):
    """All names, of which only these run where every second counts."""
    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=pytest.mark.long if name in fast else pytest.mark.slow)
        for name in NAMES])


def settings_of(name):
    model_type, changes = VARIANTS.get(name, (name, {}))
    own = name in PATTERNS or model_type == "gptj" or "num_hidden_layers" in changes
    layers = {} if own else {"num_hidden_layers": 2}
    return {**BASES[model_type], **changes, **layers, "model_type": model_type}


@functools.cache
def batch_of():
    """Two documents as padded rows, and both in one row, whose loss does not count."""
    rows = documents(0)
    counts = (rows["segment_ids"] > 0) & (np.arange(3)[:, None] < 2)
    targets = np.random.default_rng(1).integers(5, V, (3, T), dtype=np.int32)
    return rows | {"targets": targets, "loss_mask": counts.astype(np.float32)}


@functools.cache
def oracle(name):
    """(their model with random weights, its tensors)."""
    return random_model(settings_of(name))


@functools.cache
def ours(name):
    """(model, parameters, rows of the table) of their tensors."""
    return as_ours(settings_of(name), oracle(name)[1])


def logits_and_gradients(model):
    loss_fn = next_token_loss(model)

    def run(params, batch):
        def mean(params):
            sums = loss_fn(params, batch, None)
            return sums.total / sums.weight

        return model.logits(params, batch), *jax.value_and_grad(mean)(params)

    return run


@functools.cache
def computed(name):
    """Our (logits, loss, gradients)."""
    model, params, _ = ours(name)
    return jax.jit(logits_and_gradients(model))(params, batch_of())


@cases("olmo2", "cohere", "gpt_neox", "gpt_oss")
def test_logits_loss_and_gradients_are_those_of_transformers(name):
    theirs_, _ = oracle(name)
    batch = {key: torch.tensor(value[:2]) for key, value in batch_of().items()}
    expected = theirs_(batch["tokens"].long(), attention_mask=batch["segment_ids"]).logits
    nats = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), batch["targets"].long().flatten(), reduction="none")
    loss = (nats * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
    theirs_.zero_grad()
    loss.backward()
    got, our_loss, grads = computed(name)
    assert_same_logits(np.asarray(got), expected.detach().numpy())
    assert float(our_loss) == pytest.approx(loss.item(), rel=1e-5)
    table = ours(name)[2]
    shapes = tensor_shapes(grads, table)
    wanted = {key.replace("lm_head.weight", head_name(table)): grad
              for name, p in theirs_.named_parameters() if p.grad is not None
              for key, grad in as_stored(name, p.grad.numpy(), shapes)}
    fixed = {key for key in shapes if key.endswith("e_score_correction_bias")}
    wanted |= {key: np.zeros(shapes[key]) for key in fixed}  # no gradient reaches them
    assert_same_gradients(grads, table, wanted)


def as_stored(name, x, shapes):
    """The parts of a tensor of all experts, if files hold one expert each, or the tensor."""
    stem, _, last = name.rpartition(".experts.")
    if not stem or name in shapes:
        return [(name, x)]
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[last]
    return [(f"{stem}.experts.{i}.{part}.weight", share) for i, one in enumerate(x)
            for part, share in zip(parts, np.split(one, len(parts)), strict=True)]


def head_name(table):
    return table["head/table"].theirs


@cases("cohere", "smollm3", "gpt_oss")
def test_greedy_decoding_of_a_ragged_batch_gives_their_tokens(name):
    model, params, _ = ours(name)
    tokens = batch_of()["tokens"]
    expected = [oracle(name)[0].generate(
        torch.tensor(tokens[i:i + 1, :n]).long(), do_sample=False, max_new_tokens=MORE,
        eos_token_id=None, pad_token_id=0)[0, n:].numpy() for i, n in enumerate(LENGTHS)]
    at = jnp.asarray(LENGTHS, jnp.int32) - 1

    @jax.jit
    def run(params, prompt):
        cache = model.init_cache(2, LENGTHS[0] + MORE)
        logits, cache = model.step(params, prompt, cache, at)

        def one(carry, _):
            cache, last = carry
            logits, cache = model.step(params, last[:, None], cache)
            return (cache, jnp.argmax(logits, -1)), last

        last = jnp.argmax(logits, -1)
        return jax.lax.scan(one, (cache, last), length=MORE)[1].T

    np.testing.assert_array_equal(run(params, tokens[:2, :LENGTHS[0]]), np.stack(expected))


@cases("olmo2", "cohere", "gpt_neox", "falcon", "gptj", "stablelm", "gpt_oss")
def test_a_round_trip_is_bit_exact(name):
    """Tensors come back as they were, and transformers computes the same with our config.json."""
    model, params, table = ours(name)
    tensors, logits = theirs(settings_of(name))
    written = write_settings(model.config, settings_of(name)["model_type"])
    np.testing.assert_array_equal(theirs({**written, "pad_token_id": 0})[1], logits)
    get = tensor_getter(params, table)
    assert tensor_shapes(params, table).keys() == tensors.keys()
    for key, tensor in oracle(name)[1].items():
        np.testing.assert_array_equal(get(key), tensor, err_msg=key)


MESHES = {"sharded": dict(data=2, fsdp=2, tensor=2), "stages": dict(data=2, stage=2, tensor=2),
          "experts": dict(fsdp=2, expert=2, tensor=2)}


@pytest.mark.slow
@pytest.mark.parametrize("name, mesh", [
    pytest.param(name, mesh, id=f"{name}-{kind}") for name in NAMES for kind, mesh in MESHES.items()
    if kind != "experts" or name == "gpt_oss"])
def test_a_mesh_computes_what_one_device_does(name, mesh):
    model, params, _ = ours(name)
    c = model.config
    if "stage" in mesh and (c.num_layers % 2 or c.layer_pattern or c.first_dense % 2):
        pytest.skip("its layers do not divide into two stages")
    batch = {key: np.concatenate([value, value[:1]]) for key, value in batch_of().items()}
    batch["loss_mask"][3] = 0
    alone = model.config.dims.num_kv_heads % 2  # one key head is not divided
    rules = {"kv_heads": (), "act_kv_heads": ()} if alone else {}
    layout = make_layout(MeshConfig(**mesh, rules=rules))
    placed = jax.device_put(params, layout.tree(model.axes, model.shapes))

    @jax.jit
    def run(params, batch):
        with use_layout(layout):
            return logits_and_gradients(model)(params, batch)

    assert_as_on_one_device(run(placed, batch), computed(name))
