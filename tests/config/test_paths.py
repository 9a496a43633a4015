"""A path is expanded at one place, and what cannot be meant never becomes a directory."""

import json

import pytest

from lmjax.config import plain
from lmjax.config.paths import expand
from lmjax.errors import UserError
from lmjax.training.recipe import build_recipe, recorded_recipe
from lmjax.training.workdir import same_run


@pytest.fixture(autouse=True)
def variables(monkeypatch, tmp_path):
    for name, value in {"HOME": "/home/me", "DATA": "/a b", "ODD": "/x$y", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize("written, meant", [
    ("", ""), ("runs/a b", "runs/a b"), ("~", "/home/me"), ("~/x", "/home/me/x"),
    ("$DATA/x", "/a b/x"), ("${DATA}s", "/a bs"), ("$ODD/z", "/x$y/z"), ("./~x", "./~x"),
    ("file:///tmp/a%20b", "/tmp/a b"), ("file://localhost/t", "/t"), ("file:/t", "/t"),
    ("gcs://b/x", "gs://b/x"), ("GS://b/x", "gs://b/x"),
    ("run:1/x", "run:1/x"), ("2026-11-27T05:12/x", "2026-11-27T05:12/x")])
def test_paths_that_are_meant(written, meant):
    assert expand(written, "--workdir") == meant
    assert expand(expand(written, "--workdir"), "--workdir") == meant  # once


@pytest.mark.parametrize("written, part", [
    ("$NOWHERE/x", "variable NOWHERE"), ("$EMPTY/x", "an empty one"), ("$(date)", "$NAME"),
    ("~nobody-here/x", "no user"), ("gs:/b/x", "gs://BUCKET"), ("gs:b", "gs://BUCKET"),
    ("s3//b/x", "mount a bucket of S3"), ("s3://b/x", "mount a bucket"),
    ("gs://", "gs://BUCKET"), ("az://b/x", "az://b/x"),
    ("hdfs://b/x", "hdfs://b/x"), ("http://b/x", "http://b/x"), ("file://host/x", "file://host/x"),
    ("C:\\data", "write it with /"), ("C:/data", "C:/data"), ("None", "leave it empty"),
    ("null", "leave it empty"), (" /x", "spaces"), ("/x\n", "line ends"), ("\"/x\"", "leave out"),
    ("/s3/logs", "s3://"), ("/gs", "gs://")])
def test_paths_that_nobody_means(written, part):
    with pytest.raises(UserError) as caught:
        expand(written, "--workdir")
    assert part in str(caught.value) and str(caught.value).startswith("--workdir: expected ")
    assert "\n" not in str(caught.value)


def test_a_bucket_where_only_a_local_path_will_do():
    with pytest.raises(UserError, match="expected a local path, got 'gs://b'"):
        expand("gs://b", "--workdir", bucket=False)
    with pytest.raises(UserError, match="config.watch.hlo: expected a local path"):
        build_recipe({"watch": {"hlo": "s3://b/hlo"}})


def test_every_path_of_a_config_is_expanded_and_a_record_is_left_alone(tmp_path):
    paths = {"train": {"init_from": "$DATA/run"}, "checkpoint": {"directory": "gcs://b/c"},
             "watch": {"hlo": "~/hlo"}, "data": {
                 "directory": "~/d", "tokenizer": {"path": "file:///t"},
                 "sources": [{"name": "a", "uri": "tfds:a", "data_dir": "$DATA"}]}}
    recipe = build_recipe(paths)
    assert (recipe.train.init_from, recipe.checkpoint.path(tmp_path)) == ("/a b/run", "gs://b/c")
    assert (recipe.watch.hlo, recipe.data.directory) == ("/home/me/hlo", "/home/me/d")
    assert (recipe.data.tokenizer.path, recipe.data.sources[0].data_dir) == ("/t", "/a b")
    assert recorded_recipe(json.loads(json.dumps(plain(recipe)))) == recipe
    old = plain(recorded_recipe(paths))  # a run that recorded its paths as they were written
    assert old["train"]["init_from"] == "$DATA/run"
    assert same_run(tmp_path, old, plain(recipe)) == []
    gone = plain(recorded_recipe({"checkpoint": {"directory": "$NOWHERE"}}))
    assert len(same_run(tmp_path, gone, plain(build_recipe({})))) == 1
