"""Makes a tiny model with a chat template, and serves checkpoints in processes of the command."""

import base64
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp

import lmjax
from lmjax.config import plain
from lmjax.data.chat import BUILT_IN, FILE
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.lm import LM
from lmjax.models.model import build_model
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.recipe import build_recipe

ROOT = pathlib.Path(__file__).resolve().parents[1]
LENGTH = 256
TEXTS = ["the cat sat on the mat", "a dog ran to the red house", "one two three four five"]


def make(folder, family="decoder", *, length=LENGTH, **model):
    """Saves a model with random weights in `folder` and returns it."""
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=320), TEXTS * 20)
    if family == "decoder":
        tokenizer = tokenizer.with_file(FILE, BUILT_IN["chatml"].encode())
    recipe = build_recipe({
        "model": {"family": family, "num_layers": 2, "embed_dim": 32, "num_heads": 2,
                  "mlp_dim": 48, "vocab_size": 320, "init_std": 0.4, **model},
        "data": {"seq_len": length}})
    built = build_model(recipe.model, vocab_size=0, platform="cpu", dtype=jnp.float32)
    params = jax.jit(built.init)(jax.random.key(0))
    about = {"recipe": plain(recipe), "versions": lmjax.versions(), "step": 7,
             "tokenizer": base64.b64encode(tokenizer.to_bytes()).decode(),
             "compute_dtype": "float32", "data": {"fingerprint": "", "next_row": 0, "tokens": {}}}
    lm = LM(built, params, make_layout(MeshConfig(), jax.devices()[:1]), tokenizer, recipe, about)
    lm.save(folder)
    return lm


class Server:
    """A process of `lmjax serve` on a free port."""

    def __init__(self, folder, *arguments, env=None):
        """
        Args:
          folder: where its log goes.
          arguments: of the command.
          env: further environment variables.
        """
        self.log = pathlib.Path(folder) / "serve.log"
        self._arguments, self._env = arguments, env
        self.start("--port", "0")

    def start(self, *more):
        """Starts the process and waits until it answers."""
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        environment = {**os.environ, "XLA_FLAGS": flags, **(self._env or {}),
                       "JAX_COMPILATION_CACHE_DIR": str(self.log.parent / "cache")}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lmjax.cli", "serve", *map(str, self._arguments), *more],
                cwd=ROOT, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while "serving at" not in self.text() or not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def text(self):
        """What it printed."""
        return self.log.read_text()

    @property
    def url(self):
        """Its address."""
        return self.text().split("serving at ")[1].split(": open it")[0]

    def ask(self, path, body=None, *, raw=None, method=None, headers=None, timeout=60):
        """One request. Returns (status, headers, body)."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def figures(self):
        """The samples of /metrics, by name and labels."""
        lines = self.ask("/metrics")[2].decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
                for line in lines if not line.startswith("#")}

    def stop(self, number=signal.SIGTERM):
        """Sends a signal, waits for the end, and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()

    def _answers(self):
        try:
            return self.ask("/health", timeout=5)[0] == 200
        except OSError:
            return False
