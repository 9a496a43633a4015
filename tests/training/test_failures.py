"""What goes wrong ends in one line that says expected, got and fix, with exit code 2, and loses nothing saved."""

import errno
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from processes import assert_same_run, finish, lines, start

from lmjax.cli import errors
from lmjax.cli import main as cli
from lmjax.data import store
from lmjax.data.preparation import shards
from lmjax.training import checkpoint
from lmjax.training import loop as train
from lmjax.training import workdir as workdir_module
from lmjax.training.checkpoint import checkpoint_steps
from lmjax.training.recipe import TrainConfig

CONFIG = "configs/synthetic.py:tiny"
SHORT = ("train.steps=6", "optimizer.warmup_steps=2", "checkpoint.every=2", "checkpoint.keep_last=9", "eval.every=0")


def run(workdir: pathlib.Path, *overrides: str, config: str = CONFIG) -> int:
    return cli.main(["train", "--config", config, "--workdir", str(workdir), *(f"--config.{o}" for o in overrides)])


@pytest.fixture
def never_compiles(monkeypatch):
    def compiles(*args):
        raise AssertionError("the step was compiled before the mistake was found")
    monkeypatch.setattr(train, "_compile", compiles)


def one_line(capsys: pytest.CaptureFixture) -> str:
    """The one line of the error, whatever progress was printed before it."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lmjax: error: ")]
    assert len(errors) == 1
    return errors[0]


REFUSED = {
    "unknown key": (["optimizer.peak_rl=1e-3"], ["optimizer.peak_rl", "did you mean 'peak_lr'"]),
    "nan": (["optimizer.peak_lr=nan"], ["optimizer.peak_lr", "finite"]),
    "string for a number": (["train.steps=many"], ["train.steps", "integer", "many"]),
    "1e4 for an integer": (["train.steps=1e4"], ["train.steps", "integer", "write 10000"]),
    "experts without any": (["mesh.expert=2"], ["mesh.expert", "without experts", "use fsdp"]),
    "mesh and devices": (["mesh.data=3"], ["mesh", "8 devices", "data=3"]),
    "mesh and heads": (["mesh.tensor=8"], ["tensor=8", "heads=4"]),
    "mesh and kv_heads": (["mesh.tensor=4", "model.num_kv_heads=2"], ["tensor=4", "kv_heads=2"]),
    "mesh and mlp": (["mesh.tensor=4", "model.mlp_dim=66"], ["tensor=4", "mlp=66"]),
    "mesh and vocabulary": (["mesh.tensor=4", "data.tokenizer.vocab_size=66"], ["tensor=4", "vocab=66"]),
    "mesh and sequence": (["mesh.context=8", "data.seq_len=36"], ["context=8", "seq=36"]),
    "mesh and activations": (["mesh.tensor=4", "model.num_kv_heads=2",
                              'mesh.rules={"kv_heads": [], "act_kv_heads": ["tensor"]}'], ["act_kv_heads=2"]),
    "mesh and logits": (["mesh.tensor=4", "data.tokenizer.vocab_size=66",
                         'mesh.rules={"vocab": [], "act_vocab": ["tensor"]}'], ["act_vocab=66"]),
    "mesh and chunks": (["mesh.context=4", "train.loss_chunk=2"], ["context=4", "seq=2"]),
    "mesh used twice": (["mesh.data=8", 'mesh.rules={"act_embed": ["data"]}'], ["act_embed", "at most one"]),
    "mesh and batch": (["train.batch_size=6"], ["batch_size", "batch=6"]),
    "microbatches": (["train.microbatches=3"], ["microbatches", "divisor"]),
    "warm-up": (["optimizer.warmup_steps=60"], ["config.optimizer.warmup_steps", "shorten"]),
    "attention": (["model.attention=splash"], ["attention", "splash", "platform cpu (only tpu)"]),
    "loss chunk": (["train.loss_chunk=7"], ["loss_chunk", "divisor", "7"]),
    "weights and memory": (["model.mlp_dim=1000000000000"], ["optimizer state within", "GiB", "mesh.fsdp"]),
    "fewer steps than the warm-up, before data": (
        ["train.steps=5", "data.sources.0.uri=text:/nowhere/*.txt"], ["config.optimizer.warmup_steps", "shorten"]),
    "missing corpus": (["data.sources.0.uri=text:/nowhere/*.txt"], ["/nowhere/*.txt", "got"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_compiling(name, tmp_path, capsys, never_compiles):
    overrides, words = REFUSED[name]
    assert run(tmp_path / "run", *overrides) == 2
    message = one_line(capsys)
    assert all(word in message for word in [*words, "expected", "got"]), message
    assert not list((tmp_path / "run").glob("*.json*"))


def test_a_device_without_room_is_told_with_what_helps(monkeypatch, capsys):
    with pytest.raises(RuntimeError) as found:
        jax.jit(lambda: jnp.zeros(1 << 44))().block_until_ready()  # 64 TiB
    train = cli.COMMANDS["train"]._replace(run=lambda *args: (_ for _ in ()).throw(found.value))
    monkeypatch.setitem(cli.COMMANDS, "train", train)
    assert cli.main(["train", "--config", CONFIG, "--workdir", "x"]) == 2
    line = one_line(capsys)
    assert all(word in line for word in ("Out of memory", "train.microbatches", "model.remat=full"))


def test_a_fault_is_not_taken_for_a_mistake_of_the_user(monkeypatch):
    train = cli.COMMANDS["train"]._replace(run=lambda *args: np.zeros((2,)) @ np.zeros((3,)))
    monkeypatch.setitem(cli.COMMANDS, "train", train)
    with pytest.raises(ValueError, match="mismatch"):
        cli.main(["train", "--config", CONFIG, "--workdir", "x"])


def test_an_unknown_option_is_refused(capsys):
    assert cli.main(["train", "--config", CONFIG, "--workdir", "x", "--steps=3"]) == 2
    assert "--steps=3" in one_line(capsys)


def corpus(tmp_path: pathlib.Path, broken: int) -> list[str]:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.txt").write_bytes(f"Document {i} tells of the number {i * i}.\n".encode() * 20)
    for i in range(broken):
        (folder / f"{i:03}.txt").write_bytes(b"caf\xe9 \xff\xfe" * 40)
    return [f"data.sources.0.uri=text:{folder}/*.txt", "data.heldout_fraction=0.2", "data.tokenizer.vocab_size=300"]


def test_invalid_utf8_is_counted_and_skipped_within_the_budget(tmp_path, capsys):
    config = "configs/quickstart.py:tiny"
    short = ["train.steps=2", "optimizer.warmup_steps=1", "eval.batches=1", "sample.every=0"]
    assert run(tmp_path / "few", *corpus(tmp_path, broken=1), *short, config=config) == 0
    assert any("99 documents" in line and "1 broken" in line for line in capsys.readouterr().err.splitlines())
    shutil.rmtree(tmp_path / "text")
    assert run(tmp_path / "many", *corpus(tmp_path, broken=9), *short, config=config) == 2
    assert "UTF-8" in one_line(capsys)


def test_an_empty_corpus_is_refused(tmp_path, capsys, never_compiles):
    (tmp_path / "empty.txt").touch()
    assert run(tmp_path / "run", f"data.sources.0.uri=text:{tmp_path}/*.txt", config="configs/quickstart.py:tiny") == 2
    assert "expected" in one_line(capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert run(workdir, *SHORT) == 0
    return workdir


def snapshot(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("change", ["optimizer.peak_lr=0.5", "model.embed_dim=64", "data.tokenizer.vocab_size=96",
                                    "data.seed=7", "train.steps=9"])
def test_the_directory_of_another_run_is_refused_and_left_alone(change, finished, capsys, never_compiles):
    before = snapshot(finished)
    assert run(finished, *SHORT, change) == 2
    message = one_line(capsys)
    assert change.split("=")[0] in message and change.split("=")[1] in message and "--workdir" in message
    assert snapshot(finished) == before


def test_a_checkpoint_of_another_run_is_refused_by_its_record_alone(finished, tmp_path, capsys, never_compiles):
    """No array is read: there is none."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "config.json").unlink()
    for step in checkpoint_steps(workdir / "checkpoints"):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "params")
    before = snapshot(workdir)
    assert run(workdir, *SHORT, "optimizer.peak_lr=0.5") == 2
    assert "optimizer.peak_lr: 0.01 -> 0.5" in one_line(capsys)
    assert snapshot(workdir) == before


def test_a_checkpoint_of_other_arrays_is_not_taken_for_damage(finished, tmp_path, capsys, monkeypatch, never_compiles):
    """As if another version of the code, with the same config, had written it."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    monkeypatch.setattr(workdir_module, "blocking_changes", lambda before, now: ([], []))
    assert run(workdir, *SHORT, "optimizer.ema_decay=0.9") == 2
    assert "expected the arrays of this run in ema" in one_line(capsys)
    assert checkpoint_steps(workdir / "checkpoints") == [2, 4, 6]


def test_a_diverged_run_keeps_its_good_checkpoints(tmp_path, capsys):
    """Each step multiplies the weights by about -1e5, until their norm is no float32 any more."""
    workdir = tmp_path / "run"
    every = ("checkpoint.every=1", "checkpoint.keep_last=2", "optimizer.warmup_steps=0", "train.steps=12")
    assert run(workdir, *SHORT, *every, "optimizer.peak_lr=1.0", "optimizer.weight_decay=1e5") == 2
    message = one_line(capsys)
    assert "expected finite loss and weights, got" in message and "peak_lr" in message
    step = int(message.split("step ")[1].split(":")[0])
    assert step > 3 and checkpoint_steps(workdir / "checkpoints") == [step - 2, step - 1]


def test_every_so_many_steps_a_checkpoint_is_kept(tmp_path):
    workdir = tmp_path / "run"
    assert run(workdir, *SHORT, "train.steps=7", "checkpoint.every=1", "checkpoint.keep_last=2",
               "checkpoint.keep_every=3") == 0
    assert checkpoint_steps(workdir / "checkpoints") == [3, 6, 7]


def test_a_run_goes_on_for_longer_as_if_it_had_been_meant_to(tmp_path, capsys):
    longer = (*SHORT, "optimizer.schedule=constant", "train.steps=8",
              f"checkpoint.directory={tmp_path / 'elsewhere'}")
    assert run(tmp_path / "run", *longer, "train.steps=4") == 0
    assert run(tmp_path / "run", *longer) == 0
    assert run(tmp_path / "straight", *longer, "checkpoint.directory=") == 0
    both = [[r["loss"] for r in lines(tmp_path / name) if "loss" in r] for name in ("run", "straight")]
    assert len(both[0]) == 8 and both[0] == both[1] and checkpoint_steps(tmp_path / "elsewhere") == [2, 4, 6, 8]
    capsys.readouterr()
    assert run(tmp_path / "run", *longer, "optimizer.schedule=linear") == 2
    assert "the first 8 steps had, got optimizer.schedule" in one_line(capsys)


def test_other_data_than_the_checkpoint_was_trained_on_is_refused(finished, tmp_path, capsys, never_compiles):
    """The config is the same and the files behind it are not."""
    from lmjax.data.pipeline import Split

    shutil.copytree(finished, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Split, "fingerprint", property(lambda self: "e" * 64, lambda self, value: None), raising=False)
        assert run(tmp_path / "run", *SHORT) == 2
    message = one_line(capsys)
    assert "eeeeeeeeeeee" in message and "data" in message


def test_a_run_goes_on_in_the_dtype_that_it_began_in(finished, tmp_path, capsys, never_compiles, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    capsys.readouterr()
    assert run(tmp_path / "run", *SHORT) == 0
    assert "computing in float32 (auto: on cpu)" in capsys.readouterr().err
    before, dtype = snapshot(tmp_path / "run"), TrainConfig.dtype
    monkeypatch.setattr(TrainConfig, "dtype", lambda self, platform: dtype(self, "gpu"))  # as if resumed on one
    for overrides in ((), ("train.compute_dtype=bfloat16",)):
        assert run(tmp_path / "run", *SHORT, *overrides) == 2
        message = one_line(capsys)
        assert "expected to compute in float32 as this run began, got bfloat16" in message
        assert "set config.train.compute_dtype=float32" in message
        assert snapshot(tmp_path / "run") == before
    assert run(tmp_path / "run", *SHORT, "train.compute_dtype=float32") == 0
    assert "computing in float32 (asked for)" in capsys.readouterr().err


def test_a_run_goes_on_that_began_before_a_key_was_there(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    older = json.loads(file.read_text())
    del older["watch"], older["model"]["qk_norm"], older["checkpoint"]["directory"]
    file.write_text(json.dumps(older))
    capsys.readouterr()
    assert run(tmp_path / "run", *SHORT) == 0
    assert "changed since" not in capsys.readouterr().err
    file.write_text(json.dumps(older | {"model": older["model"] | {"gone": 1}}))
    assert run(tmp_path / "run", *SHORT) == 2 and "model.gone: 1 -> null" in one_line(capsys)


def test_a_finished_run_started_again_changes_nothing(finished, capsys):
    told = ("run.json", "report.html")  # of each start
    before = {k: v for k, v in snapshot(finished).items() if not any(name in k for name in told)}
    assert run(finished, *SHORT) == 0
    assert "finished: all 6 steps are done" in capsys.readouterr().err
    assert {k: v for k, v in snapshot(finished).items() if not any(name in k for name in told)} == before
    assert run(finished, *SHORT[1:], "train.steps=4") == 2
    assert "at least the 6 steps" in one_line(capsys)


@pytest.mark.parametrize("error, code, line", [
    (ValueError("seq_len: expected 8,\n got 9; lower it"), 2, "seq_len: expected 8, got 9; lower it"),
    (ValueError("an unexpected word was gotten"), 1, "ValueError: an unexpected word was gotten"),
    (UnicodeDecodeError("utf-8", b"\xe4", 0, 1, "unexpected end of data"), 1, "UnicodeDecodeError: 'utf-8' codec .*"),
    (FileNotFoundError(2, "nothing there", "a/b"), 2, "expected to read and write files, got .*nothing there.*"),
    (OSError(28, "expected room, got none; make some"), 2, r"\[Errno 28\] expected room, got none; make some")])
def test_only_what_says_expected_and_got_is_the_users(error, code, line):
    found = errors.explain(error)
    assert found[0] == code and re.fullmatch(line, found[1]), found


def flip_arrays(item: pathlib.Path) -> None:
    """One bit in the middle of every array, written by the store's own means: no reader but ours can notice.

    A bit of a data file could be of a value that a later one has replaced, and change nothing.
    """
    base = {"driver": "ocdbt", "base": f"file://{item}/"}
    for key in tensorstore.KvStore.open(base).result().list().result():
        if not key.endswith(b".zarray"):
            continue
        where = {**base, "path": key.removesuffix(b".zarray").decode()}
        array = tensorstore.open({"driver": "zarr", "kvstore": where}).result()
        values = np.array(array.read().result())
        values.reshape(-1).view(np.uint8)[values.nbytes // 2] ^= 1
        array.write(values).result()


def flip(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def biggest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE: dict[str, Callable[[pathlib.Path], None]] = {
    "a flipped bit in the weights": lambda step: flip_arrays(step / "params"),
    "a flipped bit in the moments": lambda step: flip_arrays(step / "opt_state"),
    "a truncated array": lambda step: biggest(step / "params").write_bytes(biggest(step / "params").read_bytes()[:99]),
    "a flipped bit in about": lambda step: flip(step / "about" / "metadata"),
    "missing weights": lambda step: shutil.rmtree(step / "params"),
    "an empty about": lambda step: (step / "about" / "metadata").write_bytes(b""),
}


# Orbax gives up at the first array that it cannot read; reads of others may then find its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_last_good_one(name, finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    steps = workdir / "checkpoints"
    DAMAGE[name](steps / "6")
    damaged = snapshot(steps / "6")
    assert run(workdir, *SHORT) == 0
    printed = capsys.readouterr().err
    assert "6 is damaged and not used" in printed and "resuming at step 4" in printed
    assert {pathlib.Path(k).name: v for k, v in snapshot(steps / "damaged-6").items()} == {
        pathlib.Path(k).name: v for k, v in damaged.items()}  # set aside, not deleted
    assert_same_run(finished, workdir, ["metrics.jsonl"])


def test_nothing_is_touched_when_every_checkpoint_is_damaged(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for step in checkpoint_steps(workdir / "checkpoints"):
        flip_arrays(workdir / "checkpoints" / str(step) / "params")
    before = snapshot(workdir / "checkpoints")
    assert run(workdir, *SHORT) == 2
    assert "expected a readable checkpoint" in one_line(capsys)
    assert snapshot(workdir / "checkpoints") == before


def test_a_disk_without_room_is_found_before_writing(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    usage = shutil.disk_usage(tmp_path)
    free = iter([usage.free, usage.free, 10])  # at steps 2, 4 and 6
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    assert run(workdir, *SHORT) == 2
    assert "MB free" in one_line(capsys)
    assert checkpoint_steps(workdir / "checkpoints") == [2, 4]
    monkeypatch.undo()
    assert run(workdir, *SHORT) == 0  # room again: it goes on


@pytest.mark.slow  # and one that upsets other libraries' threads: not in the run that everything depends on
# Orbax drops the futures of a save that failed without looking at them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_disk_that_fills_up_while_saving(small_disk, capsys, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)  # as if it filled up only later
    workdir = small_disk / "run"
    assert run(workdir, *SHORT) == 2
    message = one_line(capsys)
    assert "full" in message and "room" in message
    kept = checkpoint_steps(workdir / "checkpoints")
    (small_disk / "freed").unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert run(workdir, *SHORT) == 0
    assert set(kept) <= set(checkpoint_steps(workdir / "checkpoints"))


def test_two_runs_in_one_directory_are_refused(tmp_path):
    workdir = tmp_path / "run"
    long = [*SHORT[1:], "train.steps=100000"]
    first = start(workdir, *long)
    try:
        while not (workdir / "metrics.jsonl").exists():
            assert first.poll() is None
        assert "another process" in finish(workdir, *long, expect=1)  # it may have ended the next time
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


WRITERS = {
    "file": lambda path, data: path.write_bytes(data),
    "numpy": lambda path, data: np.save(path, data),
    "arrow": lambda path, data: shards.write(str(path), {"text": [data.tobytes().hex()]}),
    "tensorstore": lambda path, data: store.write_array(str(path), [data], size=len(data), dtype=data.dtype),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_known_however_a_library_words_it(name, small_disk):
    data = np.random.default_rng(0).integers(0, 2**16, 1 << 20, np.uint16)
    with pytest.raises(OSError, match="make room and run the same command again") as caught:
        with checkpoint.when_disk_full(small_disk):
            WRITERS[name](small_disk / "data", data)
    assert caught.value.errno == errno.ENOSPC
