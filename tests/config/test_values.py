"""A value on the command line is understood as its field says, or refused with what to write."""

import dataclasses
import json

import pytest

from lmjax.cli import main as cli
from lmjax.cli.recipe import recipe_of, understood
from lmjax.config import Text, build, plain
from lmjax.errors import UserError

TINY = "configs/quickstart.py:tiny"


def value_of(override):
    """The value that an override gives its key, as JSON would hold it."""
    value = plain(recipe_of(TINY, [override]))
    for name in override.partition("=")[0].split("."):
        value = value[int(name) if isinstance(value, list) else name]
    return value


@pytest.mark.parametrize("override, value, told", [
    ("sample.prompts=Once upon a time, there", ["Once upon a time, there"], True),
    ("sample.prompts=(a, b)", ["(a, b)"], True),
    ("sample.prompts={x}, y", ["{x}, y"], True),
    ("sample.prompts=[\"a, b\", \"c\"]", ["a, b", "c"], False),
    ("data.clean=newlines", ["newlines"], True),
    ("mesh.rules.embed=fsdp", ["fsdp"], True),
    ("mesh.rules.embed=[\"data\", \"fsdp\"]", ["data", "fsdp"], False),
    ("mesh.rules.embed=", [], True),
    ("data.curate.beam=--runner=X,y", ["--runner=X,y"], True),
    ("data.curate.gopher_repetition=null", None, False),
    ("data.packing=none", "none", False)])
def test_a_list_is_json_or_one_string_and_what_was_understood_is_printed(override, value, told,
                                                                         capsys):
    assert value_of(override) == value
    line = f"config.{override.partition('=')[0]} = {json.dumps(value)}\n"
    assert capsys.readouterr().err == line * told


@pytest.mark.parametrize("override, fix", [
    ("sample.prompts=['a', 'b']", 'write ["a", "b"]'),
    ("sample.prompts=('a', 'b')", 'write ["a", "b"]'),
    ("sample.prompts=[INST] hi", '["[INST] hi"]'),
    ("sample.prompts=\"Hi, you\"", "leave out the quotes"),
    ("sample.prompts=None", 'write ""'),
    ("data.clean=newlines,nfc", 'several items are a JSON list: ["newlines", "nfc"]'),
    ("data.curate.languages=en, de", '["en", "de"]'),
    ("mesh.rules.embed=data,fsdp", '["data", "fsdp"]'),
    ("model.layer_pattern=local,global", '["local", "global"]'),
    ("mesh.rules={'embed': ['data']}", 'write {"embed": ["data"]}'),
    ("mesh.rules={\"embed\": [], \"embed\": [\"data\"]}", "leave one of the two out"),
    ("data.sources=[{\"name\": \"a\", \"name\": \"b\", \"uri\": \"text:x\"}]", "leave one"),
    ("data.packing=None", 'write ""'), ("data.directory=null", 'write ""'),
    ("data.directory='/tmp/x'", "leave out the quotes"),
    ("train.steps=1,000", "write 1000"), ("train.steps=1e3", "write 1000"),
    ("train.steps=\"5\"", "write 5"), ("train.steps=5k", "write a whole number"),
    ("train.steps=_5", "write a whole number"), ("train.steps=", "write a whole number"),
    ("optimizer.peak_lr=0,001", "write it as 0.001"),
    ("model.qk_norm=yes", "write true"), ("model.qk_norm=1", "write true"),
    ("model.qk_norm=off", "write false"), ("model.qk_norm=", "write true or false"),
    ("batch_size=4", "did you mean 'train.batch_size' or 'eval.batch_size'?"),
    ("steps=4", "did you mean 'train.steps'?"), ("learning_rate=1", "remove it")])
def test_any_other_spelling_is_refused_with_the_right_one(override, fix):
    with pytest.raises(UserError) as caught:
        recipe_of(TINY, [override])
    assert fix in caught.value.fix, caught.value
    assert f"config.{override.partition('=')[0]}" in caught.value.where
    assert "\n" not in str(caught.value)


def test_groups_and_lists_of_numbers_are_json():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        x: int = 1

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner | None = None
        betas: tuple[float, ...] = ()

    made = build(Outer, {"inner": Text('{"x": 3}'), "betas": Text("[0.9, 1]")})
    assert made == Outer(Inner(3), (0.9, 1.0))
    assert build(Outer, {"inner": Text("{}")}).inner == Inner()
    for text, fix in {"0.9, 0.95": "write [0.9, 0.95]", "(0.9, 0.95)": "write [0.9, 0.95]",
                      "0.9": "write it as"}.items():
        with pytest.raises(UserError) as caught:
            build(Outer, {"betas": Text(text)})
        assert fix in caught.value.fix


def test_an_override_that_a_later_one_replaces_is_told():
    sources = 'data.sources=[{"name": "a", "uri": "text:b"}]'
    given = ["train.steps=4", "train.steps=9", "data.sources.0.weight=2", sources]
    values = plain(recipe_of(TINY, given))
    assert values["train"]["steps"] == 9 and values["data"]["sources"][0]["weight"] == 1.0
    assert understood(values, given) == [
        "config.train.steps=4 does not count: config.train.steps comes after it",
        "config.data.sources.0.weight=2 does not count: config.data.sources comes after it"]


@pytest.mark.parametrize("words, parts", [
    (["--config.train.steps", "5"], ["--config.train.steps", "write --config.train.steps=5"]),
    (["--config.train.steps", "=5"], ["write --config.train.steps=5"]),
    (["--config.train.steps"], ["write --config.train.steps=VALUE"]),
    (["--config.train.steps", "--config.a=1"], ["write --config.train.steps=VALUE"]),
    (["--workdir", "other"], ["--workdir", "got 2"]),
    (["--config=configs/t5.py"], ["--config", "got 2"]),
    (["--wokdir=x"], ["--wokdir=x", "did you mean --workdir?"]),
    (["--confg.train.steps=5"], ["--confg.train.steps=5", "an unknown one"]),
    (["\u2014config.train.steps=5"], ["an unknown one"])])
def test_slips_of_the_pen(words, parts, capsys, tmp_path):
    base = ["train", "--config", "configs/synthetic.py:tiny", "--workdir", str(tmp_path / "w")]
    assert cli.main([*base, *words]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line
    assert not (tmp_path / "w").exists()
