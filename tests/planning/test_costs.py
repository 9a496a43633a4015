"""The costs that are read off optimized HLO: by hand on small texts, and of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.planning.collectives import replica_groups
from lmjax.planning.costs import step_costs
from lmjax.planning.hlo import parse

LOOP = """HloModule jit_step, is_scheduled=true

%fused_matmul (p.0: bf16[8,16], p.1: bf16[16,4]) -> bf16[8,4] {
  %p.0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8,4]{1,0:T(8,128)(2,1)} convolution(%p.0, %p.1), \
dim_labels=bf_io->bf, metadata={op_name="jit(step)/checkpoint/rematted_computation/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"999"}}
}

%started (p.2: bf16[4,8]) -> (bf16[4,8], bf16[8,8]) {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p.2), channel_id=7, \
replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %custom-call.1 = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (p.3: bf16[4,8]) -> bf16[8,8] {
  %p.3 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%p.3), channel_id=7, \
replica_groups={{0,1},{2,3}}, dimensions={0}
}

%all-reduce-scatter.9 (p.4: f32[16]) -> f32[4] {
  %p.4 = f32[16]{0} parameter(0)
  %all-reduce.9 = f32[16]{0} all-reduce(%p.4), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice.9 = f32[4]{0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={4}
}

%body (t: (s32[], bf16[8,16], bf16[16,4], bf16[4,8])) -> \
(s32[], bf16[8,16], bf16[16,4], bf16[4,8]) {
  %t = (s32[]{:T(128)}, bf16[8,16]{1,0}, /*index=2*/bf16[16,4]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %a = bf16[8,16]{1,0} get-tuple-element(%t), index=1
  %b = bf16[16,4]{1,0} get-tuple-element(%t), index=2
  %c = bf16[4,8]{1,0} get-tuple-element(%t), index=3
  %fusion.1 = bf16[8,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused_matmul, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %fusion.2 = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) fusion(%c), kind=kCustom, calls=%started
  %fusion.3 = bf16[8,8]{1,0} fusion(%c), kind=kOutput, calls=%async_collective_fusion.3, \
backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %out = (s32[], bf16[8,16]{1,0}, bf16[16,4]{1,0}, bf16[4,8]{1,0}) tuple(%t, %a, %b, %c)
}

%condition (u: (s32[], bf16[8,16], bf16[16,4], bf16[4,8])) -> pred[] {
  %u = (s32[], bf16[8,16]{1,0}, bf16[16,4]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%u), index=0
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[16], y: f32[3]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %y = f32[3]{0} parameter(1)
  %start = (s32[], bf16[8,16]{1,0}, bf16[16,4]{1,0}, bf16[4,8]{1,0}) tuple(%x)
  %while.1 = (s32[], bf16[8,16]{1,0}, bf16[16,4]{1,0}, bf16[4,8]{1,0}) while(%start), \
condition=%condition, body=%body
  %fusion.9 = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.9
  %all-reduce.5 = f32[3]{0} all-reduce(%y), \
replica_groups=mesh['data'=2,'fsdp'=2] {'data'}, to_apply=%add
  %collective-permute-start.1 = (f32[16]{0}, f32[16]{0}) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %kernel = bf16[4,64,32]{2,1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/splash_mha_fwd"}
  ROOT %copy.1 = f32[16]{0} copy(%x), backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""


def test_the_costs_of_a_step_by_hand():
    found = step_costs(parse(LOOP), num_devices=4)
    # Five trips of a fused matmul (its own 100 cycles count, not the 999 inside it), and of a
    # fusion that only carries a gather along.
    assert found.cycles == {"matmul": 500, "other": 5 * 10 + 7}
    assert found.flops == found.recomputed_flops == 5 * 2 * 8 * 16 * 4
    table = {(c.kind, c.asynchronous): (c.times, c.bytes, c.groups, c.traffic)
             for c in found.collectives}
    assert table == {
        ("all-gather", True): (5, 128, ((0, 1), (2, 3)), 64),
        ("reduce-scatter", False): (1, 64, ((0, 1, 2, 3),), 48),
        ("all-reduce", False): (1, 12, ((0, 2), (1, 3)), 12),
        ("collective-permute", True): (1, 64, ((0, 1), (1, 0)), 64)}
    assert [(c.target, c.op_name, c.times) for c in found.calls] == [
        ("tpu_custom_call", "jit(step)/splash_mha_fwd", 1)]


def test_cycles_that_the_compiler_cannot_estimate_are_told():
    """The compiler then writes the largest number of 64 bits."""
    unknown = f'"estimated_cycles":"{2**63 - 1}"'
    found = step_costs(parse(LOOP.replace('"estimated_cycles":"10"', unknown)), 4)
    assert (found.cycles, found.unrated) == ({"matmul": 500, "other": 7}, 1)


def test_loops_of_unknown_length_count_once_and_are_told():
    text = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)).lower(
        jnp.ones((16, 16)), 3).compile().as_text()
    found = step_costs(parse(text), 1)
    assert (found.flops, found.unknown_loops) == (2 * 16**3, 1)
    assert step_costs(parse(LOOP), 4).unknown_loops == 0


def test_a_convolution_that_is_a_batched_matmul():
    """TPU writes it as a convolution over the batch; all but its diagonal is padding."""
    text = """ENTRY %m (a: bf16[8,64,32], b: bf16[8,32,16]) -> bf16[8,64,16] {
  %a = bf16[8,64,32]{2,1,0} parameter(0)
  %b = bf16[8,32,16]{2,1,0} parameter(1)
  ROOT %c = bf16[8,64,16]{2,1,0} convolution(%a, %b), \
window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}"""
    assert step_costs(parse(text), 1).flops == 2 * 8 * 64 * 32 * 16


def test_flops_and_loops_of_a_compiled_program():
    """A layer has three matmuls, forward and backward, whatever the compiler makes of them."""
    def loss(w, x):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return jnp.sum(y)

    w, x = jnp.ones((7, 32, 32)), jnp.ones((16, 32))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(w, x).compile().as_text()
    assert step_costs(parse(text), 1).flops == 7 * 3 * 2 * 16 * 32 * 32


def test_collectives_of_a_compiled_program():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    put = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "b"), ("b", None))]
    multiply = jax.jit(lambda x, w: x @ w, in_shardings=put,
                       out_shardings=NamedSharding(mesh, PartitionSpec()))
    text = multiply.lower(jnp.ones((8, 16)), jnp.ones((16, 4))).compile().as_text()
    (one,) = step_costs(parse(text), 8).collectives
    assert (one.kind, one.bytes, one.group_size, one.times) == ("all-reduce", 8 * 4 * 4, 4, 1)
    assert one.traffic == pytest.approx(2 * 3 / 4 * one.bytes)


@pytest.mark.parametrize("attributes, groups", [
    ("replica_groups={{0,4},{1,5}}", ((0, 4), (1, 5))),
    ("replica_groups=[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7))),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("replica_groups=mesh['x'=1,'y'=4,'z'=2], device_ids=([2,4]T(1,0)) {'y'}",
     ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'y'}", ((3, 1), (2, 0))),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("source_target_pairs={{3,0},{0,5}}", ((3, 0), (0, 5)))])
def test_replica_groups(attributes, groups):
    assert replica_groups(attributes, 8) == (groups, len(groups[0]))


def test_a_group_that_is_not_named_is_everyone():
    assert replica_groups("replica_groups={}", 8) == ((), 8)


SENT = """ENTRY %main (x: bf16[176,8,128]) -> token[] {
  %x = bf16[176,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all = bf16[176,8,128]{2,1,0} all-reduce(%x), replica_groups={}, to_apply=%add
  %after-all.40 = token[] after-all()
  %send.40 = (bf16[176,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) \
send(%x, %after-all.40), \
channel_id=12, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="all-reduce.63_0",_xla_megascale_target="{1,2,3,4}x{0:7}",\
_xla_megascale_transfer_type="TYPE"}
  %recv.40 = (bf16[176,8,128]{2,1,0}, u32[]{:S(2)}, token[]) recv(%after-all.40), channel_id=11, \
is_host_transfer=true
  ROOT %send-done.40 = token[] send-done(%send.40), channel_id=12, is_host_transfer=true
}"""


@pytest.mark.parametrize("sent_as, kind, traffic", [
    ("ALL_REDUCE", "all-reduce", 2 * 3 / 4), ("REDUCE_SCATTER", "reduce-scatter", 3 / 4),
    ("ALL_GATHER", "all-gather", 3), ("ONE_TO_ONE", "collective-permute", 1)])
def test_what_hosts_send_to_other_slices_is_a_collective(sent_as, kind, traffic):
    """It counts once, at the send; a group of all devices in the text lies within one slice."""
    module = parse(SENT.replace("TYPE", sent_as))
    within, sent = step_costs(module, num_devices=32, slices=4).collectives
    assert (sent.kind, sent.by_hosts, sent.asynchronous, sent.times) == (kind, True, True, 1)
    assert sent.traffic == traffic * 176 * 8 * 128 * 2
    assert (within.by_hosts, within.group_size) == (False, 8)
