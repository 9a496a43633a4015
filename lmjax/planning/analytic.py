"""An analytic model of a training step's memory and time, which ranks many recipes in a second.

It need only be right enough that the best recipe is among the few that `search` compiles.
"""

import dataclasses
import functools
from typing import NamedTuple

from lmjax.models.flops import flops_per_token
from lmjax.models.model import ModelConfig, build_model
from lmjax.nn.adapters import AdapterConfig, is_adapter
from lmjax.nn.layers import MLP_KINDS
from lmjax.nn.stack import REMAT_NAMES, kept_names
from lmjax.runtime.chips import Topology
from lmjax.training.recipe import Recipe
from lmjax.tree import num_elements, split_tree

MATMUL_SHARE = 0.75  # of the peak rate, that large matmuls reach
OVERHEAD = 0.1  # of the matmuls' time: norms, activations, the optimizer
OVERHEAD_KEEPING_ALL = 0.35  # the same with remat=none, which also writes all that it keeps
EVERYTHING = "+".join(REMAT_NAMES)  # as a remat policy: keep all results of matmuls and the kernel
MATMULS = "+".join(name for name in REMAT_NAMES if name != "kernel")


class Guess(NamedTuple):
    """What the analytic model says of a recipe."""

    memory: float  # bytes per device
    seconds_per_token: float  # of the tokens on one chip


def guess(recipe: Recipe, topology: Topology) -> Guess:
    """Memory and time of a recipe whose mesh has no -1.

    Memory: float32 parameters, gradients and two moments, split over fsdp and tensor; the
    parameters once more in bfloat16 (beside adapters they exist only so); what remat keeps of each
    layer; the logits in float32 and their gradient in bfloat16; and the gathered weights of two
    layers.

    Time: matmuls at `MATMUL_SHARE` of peak. Weights travel beside them: each pass gathers them, and
    their gradients are scattered. The activations' collectives of `tensor` and `context` are added
    to the longer of these two.
    """
    c, chip, mesh, train = recipe.model, topology.chip, recipe.mesh, recipe.train
    seq_len, vocab_size = recipe.data.seq_len, recipe.data.tokenizer.vocab_size
    total, active, layer = count_weights(dataclasses.replace(c, remat="none"), vocab_size)
    own = count_adapters(c, recipe.adapter, vocab_size)
    trained = own or total
    stages, expert = max(mesh.stage, 1), max(mesh.expert, 1)
    batch_ways = mesh.data * mesh.fsdp * expert
    split_over_data = "data" in mesh.rules.get("embed", ())
    split = stages * mesh.tensor * (batch_ways if split_over_data else mesh.fsdp * expert)
    rows = train.batch_size // train.microbatches / batch_ways
    tokens = rows * seq_len / mesh.context  # of a microbatch on a chip
    kept, again, kernel_again = remat_costs(c, layer, mesh.tensor)
    kept *= c.num_layers
    # Every pipeline stage holds the microbatches that are on their way through all stages.
    kept *= train.microbatches / stages if stages > 1 else 1
    logits = 6.0 * (c.vocab_size or vocab_size) / mesh.tensor
    loss_tokens = min(1.0, (train.loss_chunk or seq_len) / seq_len) * tokens
    memory = ((16 * trained + 2 * total) / split + tokens * kept + loss_tokens * logits
              + 4 * 2 * layer / mesh.tensor)

    attention = 2.0 * c.dims.num_heads * c.dims.head_dim * seq_len * c.num_layers  # causal, forward
    matmuls = (4 + 2 * again) * active + (6 * own or 2 * active)  # gradients of weights: 2
    flops = tokens * (matmuls + (3 + kernel_again) * attention) / mesh.tensor
    overhead = OVERHEAD_KEEPING_ALL if c.remat == "none" else OVERHEAD
    compute = flops / (chip.flops * MATMUL_SHARE) * (1 + overhead)
    passes = 2 + (again > 0.5)  # each gathers the weights of its layers, in bfloat16
    weights_sent = (passes * total + trained) * 2.0 / mesh.tensor * (mesh.fsdp > 1)
    within = weights_sent / chip.ici
    waits = (c.num_layers * (passes + 1) * 2 * tokens * c.embed_dim * 2.0 * 2 * (mesh.tensor > 1)
             / chip.ici)
    waits += (c.num_layers * passes * 4.0 * tokens * mesh.context * c.embed_dim
              * (mesh.context > 1) / chip.ici)
    between = chip.dcn if topology.slices > 1 else chip.ici
    summed = 2 * 4.0 * trained / split * (mesh.data > 1) / between
    bubble = 1 + (stages - 1) / train.microbatches
    seconds = (max(compute, within) + waits) * bubble / stages
    return Guess(memory, (seconds + summed) / (tokens / (mesh.tensor * stages)))


def remat_costs(c: ModelConfig, layer: float, tensor: int) -> tuple[float, float, float]:
    """What the remat policy of a model keeps and computes again, per layer.

    Args:
      layer: the weights of a layer that a token is multiplied by.
      tensor: the ways that kept arrays are split; the residual stream is split along its sequence.

    Returns:
      Bytes kept per token, in bfloat16; what the backward pass computes again, as a share of the
      layer's matmuls; and 1.0 if it runs the attention kernel again, else 0.0.
    """
    D, heads = c.embed_dim, c.dims.num_heads * c.dims.head_dim
    groups = (c.num_kv_heads or c.num_heads) * c.dims.head_dim
    gated = MLP_KINDS[c.mlp][1]
    # The width of the MLP; of a mixture of experts, of those that a token goes to.
    mlp = max(layer - 2 * D * (heads + groups), 0.0) / (D * (3 if gated else 2))
    # All but "out" are computed from the residual stream. Nothing needs the last matmul's result.
    width = {"query": heads, "key": groups, "value": groups, "kernel": heads, "out": D,
             "gate": mlp * gated, "up": mlp}
    device, host = kept_names({"none": EVERYTHING, "dots": MATMULS}.get(c.remat, c.remat))
    kept = 2.0 * (D + sum(width[name] for name in device)) / tensor
    if c.remat == "none":
        kept = 8.0 * D / tensor + 2 * kept  # also what lies between matmuls, partly in float32
    lost = set(REMAT_NAMES) - {*device, *host}
    again = D * sum(heads if name == "out" else width[name] for name in lost - {"kernel"})
    return kept, again / layer, float("kernel" in lost)


@functools.lru_cache(maxsize=8)
def count_weights(c: ModelConfig, vocab_size: int) -> tuple[float, float, float]:
    """All parameters; those that a token is multiplied by; of the latter, those of one layer."""
    model = build_model(dataclasses.replace(c, attention="auto"), vocab_size=vocab_size,
                        platform="cpu", dtype="float32")
    active = flops_per_token(model, 1) / 6
    head = model.config.vocab_size * c.embed_dim
    return num_elements(model.shapes), active, (active - head) / c.num_layers


@functools.lru_cache(maxsize=8)
def count_adapters(c: ModelConfig, adapter: AdapterConfig, vocab_size: int) -> float:
    """The parameters of adapters; 0 without them."""
    if not adapter.kind:
        return 0.0
    model = build_model(dataclasses.replace(c, attention="auto"), vocab_size=vocab_size,
                        platform="cpu", dtype="float32").with_adapters(adapter)
    return float(num_elements(split_tree(model.shapes, is_adapter)[0]))


def splits(c: ModelConfig, tensor: int, stages: int = 1) -> bool:
    """Whether `mesh.tensor` divides every array that it splits."""
    vocab = (c.vocab_size or tensor * stages) // stages
    sizes = c.num_heads, c.num_kv_heads or c.num_heads, c.mlp_dim, vocab
    return all(size % tensor == 0 for size in sizes)
