"""A strict place to run in: eight CPU devices, no silent broadcasting, no warnings (see pyproject.toml).

Everything here has to happen before JAX or TensorFlow is first imported, hence at the top of this file.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _cpu_features() -> str:
    """What names this CPU: a program compiled for one with other instructions may not run here."""
    try:
        cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    flags = re.search(r"^(flags|Features)\s*:.*$", cpuinfo, re.MULTILINE)
    return hashlib.sha256((flags.group() if flags else platform.machine()).encode()).hexdigest()[:8]


GPU = os.environ.get("LMJAX_TEST_PLATFORM") == "gpu"  # as launch/gpu_check has it, for the tests that are marked so
# Processes that a test starts inherit these; one that wants another number of devices sets XLA_FLAGS itself.
os.environ["JAX_PLATFORMS"] = "cuda" if GPU else "cpu"
# Compiling is most of what tests do, each program once for some milliseconds of work: without LLVM's optimisations
# that takes half the time, and by way of the older emitters, where a JAX still has them, two thirds of what is left.
if not GPU:
    older = importlib.metadata.version("jaxlib").startswith("0.10.")
    os.environ["XLA_FLAGS"] = ("--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
                               + " --xla_cpu_use_fusion_emitters=false" * older)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# XLA's thread pool. A collective holds its thread until all eight devices have joined, and independent collectives
# run at once: with the two threads a device that two cores get, all can be held by different ones, for ever.
os.environ["NPROC"] = "128"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's greetings and its notes on CPU instructions
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["MPLBACKEND"] = "agg"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Set here and not in the environment: a process that a test kills could leave half an entry behind.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / f"jax-tests-{_cpu_features()}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# With several processes (launch/test) a file is one piece of work: the longest begin first.
LONGEST = ("test_readme.py", "test_distributed.py", "test_refusals_distributed.py", "test_resume.py", "test_kernels.py",
           "test_families.py", "test_meshes.py", "test_init_from.py", "test_watch.py", "test_launch_tpu_pod.py",
           "test_launch.py")


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB, where the machine allows one to be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
