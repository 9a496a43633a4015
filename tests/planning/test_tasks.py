"""A plan of fine-tuning reads the examples that decide the arrays of a batch and the head."""

import json
import tempfile

import pytest

from lmjax.errors import UserError
from lmjax.planning.measure import measure
from lmjax.training.recipe import build_recipe
from lmjax.training.task_data import open_data, prepare_task


@pytest.mark.long
def test_a_task_is_planned_without_prepared_examples(tmp_path, monkeypatch):
    rows = [{"text": f"word {i} of {i * i}", "label": "abc"[i % 3]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe_of(**data):
        return build_recipe(dict(
            model=dict(family="encoder", num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16),
            task=dict(name="classification"), train=dict(steps=4, batch_size=8),
            optimizer=dict(warmup_steps=1),
            data=dict(sources=[dict(name="s", uri=f"jsonl:{tmp_path}/a.jsonl")], seq_len=16,
                      heldout_fraction=0.2, tokenizer=dict(vocab_size=280)) | data))

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    found = measure(recipe_of(), "cpu")[0]
    assert not list((tmp_path / "temporary").iterdir())
    prepare_task(recipe_of(), str(tmp_path / "data"), None, lambda line: None)
    assert open_data(recipe_of(), str(tmp_path / "data"))[3]["labels"] == ["a", "b", "c"]
    ready = measure(recipe_of(directory=str(tmp_path / "data")), "cpu")[0]
    for name in ("parameters", "memory", "flops_per_token"):
        assert found[name] == ready[name]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="source s"):
        measure(recipe_of(), "cpu")
