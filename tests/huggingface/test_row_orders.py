"""The order of rows in fused and in interleaved tensors, against the definition of each."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.settings import read_settings
from lmjax.huggingface.stored import rows_for
from lmjax.models.decoder import DecoderConfig
from lmjax.nn.positions import apply_rope, rope_rotation

H, G, K = 6, 2, 8
CONFIG = DecoderConfig(num_heads=H, num_kv_heads=G, head_dim=K, embed_dim=24, rotary_fraction=0.5)


def order(model_type: str, part: str) -> tuple[int, ...]:
    return rows_for(MODEL_TYPES[model_type], CONFIG)[f"layers/block/attention/{part}/kernel"].order


def test_a_group_has_its_queries_then_its_key_and_its_value():
    rows = np.arange(G * (H // G + 2) * K).reshape(G, H // G + 2, K)
    np.testing.assert_array_equal(order("falcon", "query"), rows[:, :-2].reshape(-1))
    np.testing.assert_array_equal(order("falcon", "key"), rows[:, -2].reshape(-1))
    np.testing.assert_array_equal(order("falcon", "value"), rows[:, -1].reshape(-1))


def test_neighbouring_pairs_of_theirs_are_the_pairs_that_rope_rotates_here():
    theirs = np.random.default_rng(0).standard_normal((1, 5, G, K)).astype(np.float32)
    cos, sin = rope_rotation(jnp.arange(5)[None], K // 2, 100.0)
    turned, pairs = theirs.copy(), np.arange(0, K // 2, 2)
    even, odd, (c, s) = theirs[..., pairs], theirs[..., pairs + 1], (
        np.asarray(x)[:, :, None] for x in (cos, sin))
    turned[..., pairs], turned[..., pairs + 1] = even * c - odd * s, odd * c + even * s
    mine = np.array(order("glm", "key"))

    def taken(x):
        return x.reshape(1, 5, -1)[..., mine].reshape(x.shape)

    np.testing.assert_allclose(apply_rope(jnp.asarray(taken(theirs)), (cos, sin)), taken(turned),
                               atol=1e-6)


def test_values_and_other_types_keep_their_order():
    assert not order("glm", "value")
    assert not any(row.order for row in rows_for(MODEL_TYPES["llama"], CONFIG).values())


@pytest.mark.parametrize("settings, told", [
    ({"model_type": "gptj", "rotary_dim": None}, "rotary_dim .*expected a number .*got null"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers .*an entry for layer 2"),
    ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval .*1 or more")])
def test_settings_that_say_nothing_of_a_layer_are_one_line(settings, told):
    with pytest.raises(UserError, match=told):
        read_settings(settings, "config.json")


def test_a_fraction_of_a_head_is_its_number_of_dimensions():
    for head_dim in (44, 52, 60, 88, 100, 256):  # 30/44 of 44 comes out as 29.99...
        for rotated in range(2, head_dim + 1, 2):
            config = DecoderConfig(num_heads=1, head_dim=head_dim,
                                   rotary_fraction=rotated / head_dim)
            assert config.rotary_dim == rotated
