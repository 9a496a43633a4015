"""What a start tells of its rows, and which runs it refuses because of them."""

import types

import pytest

from lmjax.data.order import Steps
from lmjax.models.decoder import DecoderConfig
from lmjax.training.announce import announce_epochs, told_heads_of


@pytest.mark.parametrize("steps, rows", [
    (Steps([(0, 0, 8)]), 80), (Steps([(0, 0, 8)]).without(3, 40), 80),
    (Steps([(0, 0, 8)]).resumed(5, 16), 120)])
def test_rows_that_were_left_out_are_not_held_against_a_run(steps, rows):
    checked = []
    split = types.SimpleNamespace(check_epochs=lambda rows, most: checked.append(rows), sources=[1],
                                  epochs=lambda rows: {"a": rows / 80})
    recipe = types.SimpleNamespace(
        train=types.SimpleNamespace(steps=10, batch_size=8), task=None,
        data=types.SimpleNamespace(max_epochs={"a": 1.0}, seq_len=4))
    run = types.SimpleNamespace(recipe=recipe, train_split=split, steps=steps)
    facts = announce_epochs(run, print)
    assert checked == [rows] and facts["epochs"] == steps.rows(10) / 80


def test_a_wider_run_says_which_heads_it_takes_the_base_to_have():
    wide = dict(embed_dim=64, num_heads=4, parametrization="mup", base_embed_dim=32)
    assert "to have 16 dimensions" in told_heads_of(DecoderConfig(**wide))
    for other in (dict(base_head_dim=8), dict(base_embed_dim=64), dict(parametrization="standard")):
        assert told_heads_of(DecoderConfig(**wide | other)) == ""
