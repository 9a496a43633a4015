"""A wrong config is refused in one line with the key, what was expected and got, and the fix."""

import dataclasses
import json
import math
import pathlib
import re
import runpy

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from lmjax.config import Text, build, load, plain
from lmjax.errors import UserError
from lmjax.models.model import build_model
from lmjax.runtime.chips import parse_topology
from lmjax.sharding import MESH_AXES, Layout, MeshConfig, make_layout
from lmjax.tasks.pairs import Pairs
from lmjax.training.changes import blocking_changes, check_schedule
from lmjax.training.recipe import Recipe, build_recipe
from lmjax.training.task_config import with_source

ROOT = pathlib.Path(__file__).resolve().parents[1]
SYNTHETIC = str(ROOT / "configs" / "synthetic.py")


def variants(path):
    """The default of a config file, and the variants that its source or docstring names."""
    return ["", *sorted(set(re.findall(r"configs/[\w/]+\.py:(\w+)", path.read_text())))]


SHIPPED = [(path, variant) for path in sorted((ROOT / "configs").rglob("*.py"))
           for variant in variants(path)]


def recipe_of(*overrides):
    """The recipe of configs/synthetic.py with overrides from a command line."""
    return build_recipe(load(SYNTHETIC, overrides))


def refusal(make, *parts):
    """Asserts that `make` raises a UserError of one line with all `parts`; returns the line."""
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("expected", "got", *parts):
        assert part in message, message
    assert re.search(r"; \S", message), f"no fix in: {message}"
    return message


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def both_ways(key, value, text, *parts):
    """Asserts that `value` in a ConfigDict and `text` on the command line are refused alike."""
    refusal(lambda: build_recipe(plain(ConfigDict(nested(key, value)))), f"config.{key}", *parts)
    refusal(lambda: recipe_of(f"{key}={text}"), f"config.{key}", *parts)


@pytest.mark.parametrize("key, near", [
    ("optimizer.peak_rl", "'peak_lr'"), ("model.num_layer", "'num_layers'"),
    ("modle.num_layers", "'model'"), ("data.tokenizer.vocabsize", "'vocab_size'"),
    ("sample.promts", "'prompts'")])
def test_unknown_key_names_the_nearest(key, near):
    known = ("optimizer", "model", "data", "sample")
    name = key if key.startswith(known) else "modle"
    parts = f"config.{name}", f"did you mean {near}?"
    refusal(lambda: build_recipe(plain(ConfigDict(nested(key, 1)))), *parts)
    refusal(lambda: recipe_of(f"{key}=1"), *parts)


def test_unknown_key_lists_the_known_ones():
    message = refusal(lambda: build_recipe({"eval": {"xyzzy": 1}}), "config.eval.xyzzy",
                      "remove it")
    for field in ("every", "batches", "batch_size"):
        assert field in message
    refusal(lambda: build_recipe({"eval": {3: 1}}), "config.eval.3")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "NaN", "1e999"])
@pytest.mark.parametrize("key", ["optimizer.peak_lr", "model.dropout"])
def test_floats_are_finite(key, text):
    both_ways(key, float(text), text, "a finite number")


@pytest.mark.parametrize("value, text, fix", [
    ("10", "ten", "write"), (1e4, "1e4", "write 10000"), (1.5, "1.5", "write a whole number"),
    (True, "True", "write"), (None, "None", "write"), ([1], "[1]", "write"),
    (float("nan"), "nan", "write")])
@pytest.mark.parametrize("key", ["train.steps", "data.tokenizer.vocab_size"])
def test_integers_are_integers(key, value, text, fix):
    both_ways(key, value, text, "an integer", fix)


@pytest.mark.parametrize("key, value, text, expected", [
    ("optimizer.peak_lr", "1e-3", "fast", "a number"),
    ("optimizer.peak_lr", True, "True", "a number"),
    ("model.use_bias", 1, "1", "true or false"), ("model.use_bias", "true", "yes", "true or false"),
    ("model", 5, "5", "a group of keys"), ("model.num_heads", {}, "", "an integer")])
def test_wrong_types(key, value, text, expected):
    both_ways(key, value, text, expected)


def test_wrong_types_without_a_command_line_form():
    for huge in (10**400, -10**5000):  # integers beyond float and int64
        refusal(lambda huge=huge: build_recipe({"optimizer": {"peak_lr": huge}}),
                "config.optimizer.peak_lr", "finite", "inf")
    refusal(lambda: build_recipe({"model": {"norm": 5}}), "config.model.norm", "a string")
    refusal(lambda: build_recipe({"model": None}), "config.model", "a group of keys")
    refusal(lambda: build_recipe({"sample": {"prompts": "def "}}), "config.sample.prompts",
            "a list")
    refusal(lambda: build_recipe({"mesh": {"rules": ["mlp"]}}), "config.mesh.rules", "a mapping")


@pytest.mark.parametrize("override, parts", [
    ("model.norm=batchnorm", ("rmsnorm, rmsnorm_1p, layernorm", "'batchnorm'")),
    ("model.remat=ful", ("none, full, attention, dots", "'ful'")),
    ("model.remat=query+host:kee", ("key", "correct 'kee'")),
    ("model.num_heads=7", ("divisor of embed_dim=64", "7")),
    ("model.num_kv_heads=3", ("divisor of num_heads=4", "3")),
    ("model.head_dim=5", ("even", "5")),
    ("model.dropout=1.0", ("less than 1",)),
    ("model.num_layers=0", ("at least 1", "0")),
    ("train.microbatches=3", ("divisor of batch_size=16", "3")),
    ("train.compute_dtype=float16", ("bfloat16",)),
    ("optimizer.name=adam", ("adamw",)),
    ("sample.top_p=0", ("(0, 1]",)),
    ("checkpoint.keep_last=0", ("at least 1",)),
    ("train.steps=99999999999999999999", ("64 bits",)),
    ("train.seed=4294967296", ("less than 2^32",)),
    ("optimizer.peak_lr=1e39", ("finite",)),
    ("model.rope_theta=0", ("at least 1",)),
    ("model.norm_eps=-1", ("at least 0",)),
    ("model.init_std=-1", ("at least 0",))])
def test_values_that_the_types_cannot_refuse(override, parts):
    refusal(lambda: recipe_of(override), f"config.{override.partition('=')[0]}", *parts)


def test_rows_longer_than_the_position_table():
    refusal(lambda: recipe_of("model.positions=learned", "model.max_positions=32"),
            "config.data.seq_len", "model.max_positions=32", "64")


def test_files_that_are_no_configs(tmp_path):
    refusal(lambda: load(str(tmp_path / "none.py")), "none.py", "does not exist")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    refusal(lambda: load(str(empty)), "get_config()", "got None")


@pytest.mark.parametrize("text, what", [
    ("x = 1 +\n", "SyntaxError"), ("import no_such_package\n", "ModuleNotFoundError"),
    ("x = {}['a']\n", "line 1: KeyError"),
    ("def get_config():\n    return nowhere\n", "line 2: NameError"),
    ("def get_config():\n    pass\n", "got None"),
    ("def get_config():\n    return [1]\n", "got [1]"), ("get_config = 3\n", "got 3"),
    ("def get_config():\n    raise ValueError('bad')\n", "line 2: ValueError: bad")])
def test_config_files_that_fail_are_named_with_the_line(tmp_path, text, what):
    file = tmp_path / "c.py"
    file.write_text(text)
    refusal(lambda: load(str(file)), str(file), what)
    if "def get_config():" in text:
        refusal(lambda: load(f"{file}:tiny"), str(file), "TypeError")


def test_overrides_without_a_place():
    refusal(lambda: load(SYNTHETIC, ["train.steps"]), "train.steps", "no '='")
    refusal(lambda: load(SYNTHETIC, ["train.steps.more=1"]), "config.train.steps.more", "60")
    refusal(lambda: load(SYNTHETIC, ["data.sources.1.weight=2"]), "config.data.sources.1.weight",
            "below 1")
    refusal(lambda: load(SYNTHETIC, ["data.sources.first.weight=2"]),
            "config.data.sources.first.weight")
    refusal(lambda: load("configs/bert.py", ["data.sources.0.name.first=2"]),
            "config.data.sources.0.name.first", "python-stdlib")
    refusal(lambda: load("configs/quickstart.py", ["sample.prompts.0.x=2"]),
            "config.sample.prompts.0.x", "def read")
    # A list that the file does not set can be made from its items, if none is missing.
    gap = {"data": {"sources": {"1": {"name": "a", "uri": "synthetic"}}}}
    refusal(lambda: build_recipe(gap), "config.data.sources", "a list")
    refusal(lambda: build_recipe({"data": {"sources": {"0": {"weight": 2.0}}}}),
            "config.data.sources.0", "name, uri")


def test_variants_reach_get_config(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("def get_config(variant='plain'):\n"
                    "    return {'data': {'tokenizer': {'path': variant}}}\n")
    assert build_recipe(load(str(file))).data.tokenizer.path == "plain"
    assert build_recipe(load(f"{file}:big")).data.tokenizer.path == "big"


def test_command_line_values_take_the_type_of_their_field():
    recipe = recipe_of(
        "train.steps=1_000", "optimizer.peak_lr=1e-2", "optimizer.weight_decay=0",
        "model.use_bias=true", "model.qk_norm=False", "data.directory=123",
        "data.sources.0.weight=2", "data.sources.0.name=a", "data.tokenizer.vocab_size=128",
        "train.steps=7")
    assert recipe.train.steps == 7 and type(recipe.train.steps) is int  # the last override counts
    assert recipe.optimizer.peak_lr == 0.01 and type(recipe.optimizer.weight_decay) is float
    assert (recipe.model.use_bias, recipe.model.qk_norm) == (True, False)
    assert recipe.data.directory == "123" and isinstance(recipe.data.directory, str)
    assert recipe.data.sources[0].weight == 2.0 and recipe.data.sources[0].name == "a"
    assert recipe.data.sources[0].uri == "synthetic" and recipe.data.tokenizer.vocab_size == 128


@pytest.mark.parametrize("text, items", [
    ("a time, there", ("a time, there",)), ("one", ("one",)), ("", ()), ("[]", ()),
    ('["f(a, b)", "[x]"]', ("f(a, b)", "[x]"))])
def test_tuples_on_the_command_line(text, items):
    recipe = recipe_of(f"sample.prompts={text}")
    assert recipe.sample.prompts == items and all(type(item) is str for item in items)


def test_dicts_on_the_command_line():
    rules = {"kv_heads": (), "batch": ("data",)}
    for overrides in (['mesh.rules={"kv_heads": [], "batch": ["data"]}'],
                      ["mesh.rules.kv_heads=", "mesh.rules.batch=data"]):
        assert recipe_of(*overrides).mesh.rules == rules
    refusal(lambda: recipe_of("sample.prompts=[1, 2"), "config.sample.prompts", "JSON")
    refusal(lambda: recipe_of("mesh.rules={1"), "config.mesh.rules", "JSON")


def test_numpy_scalars_are_taken():
    recipe = build_recipe({"train": {"steps": np.int64(5)},
                           "optimizer": {"peak_lr": np.float32(0.5)}})
    assert type(recipe.train.steps) is int and type(recipe.optimizer.peak_lr) is float


def test_optional_fields():
    @dataclasses.dataclass(frozen=True)
    class Some:
        size: int | None = 3

    assert build(Some, {"size": None}).size is None
    assert build(Some, {"size": Text("None")}).size is None
    assert build(Some, {"size": Text("4")}).size == 4
    refusal(lambda: build(Some, {"size": 1.5}), "config.size", "an integer")


@pytest.mark.parametrize("path, variant", SHIPPED, ids=[f"{p.stem}-{v}" for p, v in SHIPPED])
def test_shipped_configs_survive_json(path, variant):
    recipe = build_recipe(load(f"{path}:{variant}" if variant else str(path)))
    again = build(Recipe, json.loads(json.dumps(plain(recipe))))
    assert again == recipe
    assert plain(again) == plain(recipe)
    # A ConfigDict makes the same recipe.
    get_config = runpy.run_path(str(path))["get_config"]
    assert build_recipe(get_config(variant) if variant else get_config()) == recipe


PLANNED = [found for path in sorted({path for path, _ in SHIPPED})
           for found in re.findall(r"lmjax plan --config (\S+) --topology (\S+)", path.read_text())]


@pytest.mark.parametrize("spec, topology", PLANNED, ids=[" ".join(found) for found in PLANNED])
def test_recipes_divide_evenly_over_the_pods_that_they_name(spec, topology):
    """Weights, rows and heads divide. The recipes' docstrings say whether they fit into memory."""
    recipe, devices = build_recipe(load(str(ROOT / spec))), parse_topology(topology).devices
    sizes = {axis: getattr(recipe.mesh, axis) for axis in MESH_AXES}
    left = devices // -math.prod(sizes.values())
    sizes = {axis: left if n == -1 else n for axis, n in sizes.items()}
    assert math.prod(sizes.values()) == devices
    rules = make_layout(MeshConfig(rules=recipe.mesh.rules)).rules
    layout = Layout(AbstractMesh(tuple(sizes.values()), tuple(sizes)), rules)
    model = build_model(recipe.model, vocab_size=recipe.data.tokenizer.vocab_size, platform="tpu",
                        dtype=recipe.train.dtype("tpu"), seq_len=recipe.data.seq_len)
    layout.tree(model.axes, model.shapes)
    rows = recipe.train.batch_size // recipe.train.microbatches
    layout.spec(("batch", "seq"), (rows, recipe.data.seq_len))
    assert recipe.optimizer.warmup_steps < recipe.train.steps / 10


def test_json_is_json():
    """The JSON of a recipe is strict JSON and makes an equal recipe."""
    recipe = build_recipe({"mesh": {"rules": {"kv_heads": [], "mlp": ["tensor"]}},
                           "optimizer": {"peak_lr": 1e-3 / 3},
                           "sample": {"prompts": ["ü\n\"", ""]}})

    def no_constants(name):
        raise AssertionError(name)

    values = json.loads(json.dumps(plain(recipe)), parse_constant=no_constants)
    assert build(Recipe, values) == recipe


def test_mesh_values():
    refusal(lambda: MeshConfig(data=-1, fsdp=-1), "data", "-1 on at most one")
    refusal(lambda: MeshConfig(tensor=0), "tensor", "at least 1")
    refusal(lambda: MeshConfig(fsdp=-2), "fsdp", "at least 1")
    for rule, part in (("kv_head=tensor", "kv_heads"), ("mlp=tenser", "tensor")):
        name, _, axis = rule.partition("=")
        refusal(lambda rule=rule: recipe_of(f"mesh.rules.{rule}"), f"config.mesh.rules.{name}",
                part, axis)


def changed(**keys):
    old = plain(build_recipe({}))
    new = plain(build_recipe({}))
    for key, value in keys.items():
        group, _, name = key.partition("__")
        new[group][name] = value
    return blocking_changes(old, new)


@pytest.mark.parametrize("key, value", [
    ("model__num_layers", 3), ("model__attention_softcap", 30.0), ("model__sliding_window", 8),
    ("train__seed", 1), ("train__z_loss", 1e-4),
    ("optimizer__peak_lr", 1.0), ("data__seed", 3), ("data__seq_len", 8), ("data__sources", [])])
def test_changes_of_the_computation_block_a_resume(key, value):
    bad, fine = changed(**{key: value})
    assert len(bad) == 1 and not fine
    assert bad[0].startswith(f"{key.replace('__', '.')}: ") and " -> " in bad[0]


@pytest.mark.parametrize("key, value", [
    ("model__attention", "xla"), ("model__remat", "full"), ("model__scan_layers", False),
    ("mesh__fsdp", 4), ("mesh__rules", {"mlp": []}), ("eval__every", 7),
    ("checkpoint__keep_last", 3), ("sample__prompts", ["a"]), ("train__microbatches", 2),
    ("train__log_every", 5), ("train__loss_chunk", 8), ("data__directory", "/elsewhere"),
    ("data__memory_limit_mib", 5), ("train__batch_size", 32),
    ("data__stages", [{"row": 5, "weights": {"a": 1.0}}]), ("data__max_epochs", {"a": 2.0}),
    ("train__compute_dtype", "float32"), ("train__init_from", "/elsewhere"),
    ("data__tokenizer", {**plain(build_recipe({}))["data"]["tokenizer"], "path": "/elsewhere"}),
    ("data__sources", [{**plain(build_recipe({}))["data"]["sources"][0], "data_dir": "/tfds"}])])
def test_changes_of_the_machine_or_the_data_stages_do_not(key, value):
    bad, fine = changed(**{key: value})
    assert not bad and len(fine) == 1


@pytest.mark.long
def test_a_run_may_become_longer_if_past_learning_rates_stay_the_same():
    def recipe(steps, schedule="constant", **more):
        return build_recipe({"train": {"steps": steps},
                             "optimizer": {"schedule": schedule, "warmup_steps": 5, **more}})

    check_schedule(recipe(20), recipe(40), 20)
    check_schedule(recipe(20, "inverse_sqrt"), recipe(40, "inverse_sqrt"), 20)
    # Resumed before the decay began; and a constant rate that begins to decay now.
    check_schedule(recipe(20, "wsd", decay_fraction=0.25), recipe(40, "wsd"), 15)
    check_schedule(recipe(20), recipe(30, "wsd", decay_fraction=1 / 3), 20)
    for step, old, new in ((17, recipe(20, "wsd", decay_fraction=0.25), recipe(40, "wsd")),
                           (7, recipe(20, "cosine"), recipe(40, "cosine"))):
        refusal(lambda step=step, old=old, new=new: check_schedule(old, new, step),
                f"first {step} steps", "train.steps: 20 -> 40")


def test_a_new_key_and_a_gone_one_are_changes():
    assert blocking_changes({"train": {"old": 1}}, {"train": {"new": 2}})[0] == [
        "train.old: 1 -> null", "train.new: null -> 2"]
    assert blocking_changes(plain(build_recipe({})), plain(build_recipe({}))) == ([], [])


def test_a_group_may_be_a_json_object_also_where_its_name_chooses_the_kind():
    task = '{"name": "pairs", "input": "{q}", "target": "{a}"}'
    written = load("configs/tasks/sums.py", [f"task={task}"])
    recipe = build_recipe(with_source(written))
    assert isinstance(recipe.task, Pairs) and recipe.task.input == "{q}"
    for text in ('{"name": "pairs"', '{"name": "pairs", "name": "chat"}'):
        with pytest.raises(UserError, match="config.task"):
            build_recipe(with_source(load("configs/tasks/sums.py", [f"task={text}"])))
