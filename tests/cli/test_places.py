"""Where nothing can be written: one line before the work begins, whatever the path is for."""

import errno
import os
import pwd
import tempfile

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from processes import one_line

from lmjax import lm
from lmjax.benchmarks import data as bench_data
from lmjax.cli.main import main
from lmjax.data.preparation import prepare
from lmjax.errors import UserError
from lmjax.planning import compile as plan_compile
from lmjax.planning import plan
from lmjax.runtime.devices import CACHE, READ_ONLY, use_compilation_cache
from lmjax.runtime.files import cache_directory, check_writable, new_directory
from lmjax.training import loop, setup

TRAIN = ["train", "--config", "configs/synthetic.py:tiny", "--workdir"]
TEXT = ["train", "--config", "configs/quickstart.py:tiny", "--workdir"]
# What is to be written -> a command that writes it to "{}", and how its line begins.
WRITES = {
    "workdir": ([*TRAIN, "{}"], "--workdir"),
    "checkpoints": ([*TRAIN, "run", "--config.checkpoint.directory={}"],
                    "config.checkpoint.directory"),
    "data": ([*TEXT, "run", "--config.data.directory={}"], "{}"),
    "hlo": ([*TRAIN, "run", "--hlo", "{}"], "config.watch.hlo"),
    "prepare": (["prepare", "--config", "configs/quickstart.py:tiny", "--out", "{}"], "{}"),
    "import-hf": (["import-hf", "model", "--out", "{}"], "--out"),
    "export-hf": (["export-hf", "model", "--out", "{}"], "--out"),
    "plan": (["plan", "--config", "configs/llama2_7b.py:tiny", "--topology", "cpu", "--out", "{}"],
             "--out"),
    "bench": (["bench", "data", "--out", "{}/figures.json"], "--out"),
    "eval": (["eval", "model", "--tasks", "none", "--out", "{}/results.json"], "--out"),
}
# Why nothing can be written at a path -> the path, and what the line says that was got.
PLACES = {
    "a file above it": ("{}/file/below/x", "the file {}/file; move it away"),
    "no real file system": ("/proc/lmjax/x", "/proc, which is not (no such file or directory); "),
    "a link that leads nowhere": ("{}/link/x", "the link {}/link, which leads nowhere; make what"),
    "a read-only file system": ("{}/read-only/x", "{}/read-only, which is not (read-only file sys"),
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A directory with all `PLACES`, in which none of the work of `WRITES` may begin."""
    temporary_file = tempfile.TemporaryFile

    def read_only(*args, **options):
        if "read-only" in str(options.get("dir")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), options["dir"])
        return temporary_file(*args, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    for module, name in ((loop, "_compile"), (setup, "open_run"), (prepare, "run_stages"),
                         (lm, "load"), (plan, "compiled"), (bench_data, "corpus")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("missing/mount")
    (tmp_path / "read-only").mkdir()
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", WRITES)
def test_refused_in_one_line_and_nothing_is_left(kind, place, places, capsys):
    (command, where), (path, got) = WRITES[kind], PLACES[place]
    path, got = path.format(places), got.format(places)
    before = sorted(places.rglob("*"))
    command = [str(places / "run") if word == "run" else word.format(path) for word in command]
    assert main(command) == 2
    line = one_line(capsys.readouterr().err)
    assert line.startswith(f"lmjax: error: {where.format(path)}: expected a "), line
    assert f"that can be written, got {got}" in line
    run = {places / "run", places / "run/.lock"}  # a refused start leaves its lock, no records
    assert sorted(set(places.rglob("*")) - run) == before
    assert (places / "file").read_text() == "kept"


def test_a_profile_has_a_place_before_its_steps_come(places, capsys):
    (places / "run").mkdir()
    (places / "run/profile").write_text("kept")
    assert main([*TRAIN, str(places / "run"), "--profile", "2:3"]) == 2
    assert f"got the file {places}/run/profile; " in one_line(capsys.readouterr().err)


def test_what_can_be_written_stays_as_it_is(tmp_path):
    (tmp_path / "file").write_text("kept")
    times = os.stat(tmp_path).st_mtime_ns, os.stat(tmp_path / "file").st_mtime_ns
    for path, is_file in (("", False), ("a/b", False), ("a/b.json", True), ("file", True)):
        check_writable(tmp_path / path, "--out", file=is_file)
    check_writable("gs://bucket/a", "config.checkpoint.directory")
    check_writable("/dev/stdout", "--out", file=True)
    assert times == (os.stat(tmp_path).st_mtime_ns, os.stat(tmp_path / "file").st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match=f"a file that can .*, got the directory {tmp_path};"):
        check_writable(tmp_path, "--out", file=True)
    with pytest.raises(UserError, match="which is not .file name too long"):
        check_writable(tmp_path / ("x" * 300), "--out")


@pytest.mark.parametrize("target", ("missing", "empty"))
def test_a_new_directory_does_not_replace_a_link(target, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(target)
    with (pytest.raises(UserError, match="expected a directory that does not exist yet"),
          new_directory(tmp_path / "out")):
        pytest.fail("the work has begun")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_prepared_data_goes_where_a_link_leads(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"Document {i} tells of the number {i * i}.\n" * 20)
    (tmp_path / "disk/empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/empty")
    command, _ = WRITES["prepare"]
    assert main([*(word.format(tmp_path / "link") for word in command),
                 f"--config.data.sources.0.uri=text:{tmp_path}/*.txt",
                 "--config.data.heldout_fraction=0.2",
                 "--config.data.tokenizer.vocab_size=300"]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/empty/manifest.json").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["empty"]


def test_a_mount_point_is_refused_before_data_is_prepared_for_it(places, monkeypatch, capsys):
    """The finished directory could not be renamed to it."""
    mount = places / "mount"
    mount.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(mount))
    command, _ = WRITES["prepare"]
    assert main([word.format(mount) for word in command]) == 2
    line = one_line(capsys.readouterr().err)
    assert f"got a mount point; use one below it, such as {mount}/prepared" in line
    assert not list(mount.iterdir()) and not list(places.glob(".*"))


@pytest.fixture
def cache_setting():
    names = ("jax_compilation_cache_dir", *READ_ONLY)
    before = {name: getattr(jax.config, name) for name in names}

    def use(value):
        jax.config.update("jax_compilation_cache_dir", value)
        compilation_cache.reset_cache()

    yield use
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("place", ["no home", *PLACES])
def test_a_cache_that_cannot_be_written_is_left_out(place, places, cache_setting, monkeypatch,
                                                    capsys):
    path = ""
    if place == "no home":  # as for a container's user without an entry in /etc/passwd
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
        got = "none; set HOME"
    else:
        path, got = (text.format(places) for text in PLACES[place])
    before = sorted(places.rglob("*"))
    cache_setting(path or None)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"going on without a cache: {CACHE}: expected ") and got in line
    assert cache_directory("plan", path, plan_compile.CACHE) == (None, False)
    assert plan_compile.CACHE in capsys.readouterr().err
    assert sorted(places.rglob("*")) == before


def test_a_cache_that_cannot_be_written_is_read(places, cache_setting, monkeypatch, capsys):
    events: list[str] = []
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    cache_setting(str(places / "read-only"))

    def compile_again(number: int) -> None:
        jax.jit(lambda x: x * number)(jax.numpy.ones(3)).block_until_ready()

    compile_again(71)
    kept = sorted(places.rglob("*"))
    assert len(kept) > len(sorted(places.iterdir()))
    jax.clear_caches()
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    use_compilation_cache()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"reading a cache and adding nothing to it: {CACHE}: expected ")
    assert jax.config.jax_compilation_cache_dir == str(places / "read-only")
    compile_again(71)
    assert "/jax/compilation_cache/cache_hits" in events
    compile_again(72)
    assert sorted(places.rglob("*")) == kept
    plans = places / "read-only"
    assert cache_directory("plan", str(plans), plan_compile.CACHE) == (plans, False)
