"""Strict tests: eight CPU devices, no silent broadcasting, no warnings (see pyproject.toml).

All of this must happen before JAX or TensorFlow is imported, so it stands at the top of this file.
"""

import gc
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _cpu_features() -> str:
    """A hash of the CPU's instruction sets: a program compiled for others may not run here."""
    try:
        cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    flags = re.search(r"^(flags|Features)\s*:.*$", cpuinfo, re.MULTILINE)
    return hashlib.sha256((flags.group() if flags else platform.machine()).encode()).hexdigest()[:8]


GPU = os.environ.get("LMJAX_TEST_PLATFORM") == "gpu"  # launch/gpu_check runs the tests marked gpu
# The processes that a test starts inherit these variables.
os.environ["JAX_PLATFORMS"] = "cuda" if GPU else "cpu"
if not GPU:
    # Tests mostly compile: each program runs for some milliseconds. Without LLVM's optimisations
    # compiling takes half the time. The older emitters of jaxlib 0.10 take two thirds of that.
    older = importlib.metadata.version("jaxlib").startswith("0.10.")
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
        + " --xla_cpu_use_fusion_emitters=false" * older)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# The size of XLA's thread pool. A collective holds one thread per device until all devices have
# joined. With few threads, independent collectives can wait for each other for ever.
os.environ["NPROC"] = "128"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # without TensorFlow's start-up messages
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["MPLBACKEND"] = "agg"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# The processes that tests start do not share this cache: a killed one could leave a broken entry.
CACHE = ROOT / ".cache" / f"jax-tests-{_cpu_features()}"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# With several workers (launch/test) one worker runs a whole file. The longest files start first.
LONGEST = ("test_readme.py", "test_distributed.py", "test_refusals.py", "test_resume.py",
           "test_kernels.py", "test_families.py", "test_meshes.py", "test_init_from.py",
           "test_watchdog.py", "test_tpu_pod.py", "test_launch.py")


def pytest_collection_modifyitems(items: list) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
    # Tracing makes many objects. Looking for garbage among those of all imported libraries, each
    # time that there are 700 new ones, takes a fifteenth of the tests' time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB, if this machine allows to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
