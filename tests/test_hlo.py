"""The reader of scheduled programs, against programs whose work is known by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.hlo import Collective, Done, Loop, Op, Program, Start, convolution_flops, total
from crystal_jax.hlo_text import Computation, read_arrays, read_group, read_instruction

LOOP = """\
HloModule jit_f, is_scheduled=true

%fused_product (a: bf16[4,256,512], b: bf16[256,512], i: s32[]) -> bf16[256,256] {
  %a = bf16[4,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,256,512}
  %flat = bf16[256,512]{1,0:T(8,128)(2,1)} bitcast(%slice)
  %b = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %product = bf16[256,256]{1,0:T(8,128)(2,1)} convolution(%flat, %b), dim_labels=bf_oi->bf
}

%gathering (p: bf16[64,512]) -> bf16[256,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  ROOT %inner = bf16[256,512]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"

%body (state: (s32[], bf16[4,256,512], bf16[64,512])) -> (s32[], bf16[4,256,512], bf16[64,512]) {
  %state = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0}, /*index=2*/bf16[64,512]{1,0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  %weights = bf16[4,256,512]{2,1,0} get-tuple-element(%state), index=1
  %shard = bf16[64,512]{1,0} get-tuple-element(%state), index=2
  %begin = ((bf16[64,512]{1,0}, token[]), bf16[256,512]{1,0}) async-start(%shard), calls=%gathering
  %first = bf16[256,256]{1,0} fusion(%weights, %shard, %count), kind=kOutput, calls=%fused_product, \
backend_config={"window_config":{"estimated_cycles":"700"}}
  %end = bf16[256,512]{1,0} async-done(%begin)
  %sum = bf16[256,512]{1,0} all-reduce(%end), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%count, %one), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="next"}
  ROOT %out = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0}, bf16[64,512]{1,0}) tuple(%next, %weights, %shard)
}

%condition (state.1: (s32[], bf16[4,256,512], bf16[64,512])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %state.1 = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0}, bf16[64,512]{1,0}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main (w: bf16[4,256,512], x: bf16[64,512]) -> bf16[64,512] {
  %start = s32[]{:T(128)} constant(1)
  %w = bf16[4,256,512]{2,1,0} parameter(0), metadata={op_name="state.params['w']"}
  %x = bf16[64,512]{1,0} parameter(1), metadata={op_name="batch['x']"}
  %from = s32[]{:T(128)} copy(%start)
  %all = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0}, bf16[64,512]{1,0}) tuple(%from, %w, %x)
  %while = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0}, bf16[64,512]{1,0}) while(%all), condition=%condition, body=%body
  ROOT %last = bf16[64,512]{1,0} get-tuple-element(%while), index=2
}
"""


def test_a_loop_counts_as_often_as_it_runs() -> None:
    events = Program(LOOP).events
    loop, = (event for event in events if isinstance(event, Loop))
    assert loop.trips == 4  # from 1 to 5
    work = total(events)
    assert work.flops == 4 * 2 * 256 * 256 * 512
    assert work.cycles == 4 * 700
    # Of a stack of weights a pass reads the layer that it slices out; the rest is read as it is.
    product, = (event for event in loop.body if isinstance(event, Op) and event.flops)
    assert product.bytes == 2 * (256 * 512 + 64 * 512 + 256 * 256) + 4


def test_collectives_are_found_inside_what_starts_them() -> None:
    loop, = (event for event in Program(LOOP).events if isinstance(event, Loop))
    kinds = [(type(event).__name__, getattr(event, "waits", None)) for event in loop.body]
    assert [kind for kind in kinds if kind[0] != "Op"] == [("Start", False), ("Done", None), ("Start", True)]
    gather, reduce_ = (event.collective for event in loop.body if isinstance(event, Start))
    assert (gather.kind, gather.bytes, gather.group) == ("all-gather", 4 * 64 * 512 * 2, (0, 1, 2, 3))
    assert (reduce_.kind, reduce_.bytes) == ("all-reduce", 256 * 512 * 2)
    assert [event.name for event in loop.body if isinstance(event, Done)] == [gather.name]


FUSED = """\
%begun (p: bf16[64]) -> (bf16[64], bf16[256]) {
  %p = bf16[64]{0} parameter(0)
  %g = bf16[256]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = (bf16[64]{0}, bf16[256]{0}) custom-call(%g), custom_call_target="Start"
}

%async_collective_fusion.1 (p.1: bf16[64], q: bf16[8,8]) -> bf16[8,8] {
  %q = bf16[8,8]{1,0} parameter(1)
  %p.1 = bf16[64]{0} parameter(0)
  %g.1 = bf16[256]{0} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %product = bf16[8,8]{1,0} convolution(%q, %q), dim_labels=bf_io->bf
}

%scattered (s: f32[256]) -> f32[64] {
  %s = f32[256]{0} parameter(0)
  %i = s32[] constant(0)
  %sum = f32[256]{0} all-reduce(%s), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[64]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={64}
}

ENTRY %main (a: bf16[64], b: bf16[8,8], f: f32[256]) -> f32[64] {
  %a = bf16[64]{0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  %f = f32[256]{0} parameter(2)
  %async-collective-start.2 = (bf16[64]{0}, bf16[256]{0}) fusion(%a), kind=kCustom, calls=%begun
  %beside = bf16[8,8]{1,0} fusion(%a, %b), kind=kOutput, calls=%async_collective_fusion.1
  %async-collective-done.2 = (bf16[64]{0}, bf16[256]{0}) fusion(%a), kind=kCustom, calls=%begun
  ROOT %rest = f32[64]{0} fusion(%f), kind=kCustom, calls=%scattered
}
"""


def test_collectives_that_are_fused_with_products() -> None:
    start, product, done, scatter = Program(FUSED).events
    assert isinstance(start, Start) and not start.waits and start.collective.bytes == 512
    assert isinstance(product, Op) and product.flops == 2 * 8**3
    assert done == Done(start.collective.name)
    assert isinstance(scatter, Start) and scatter.waits
    assert (scatter.collective.kind, scatter.collective.bytes) == ("reduce-scatter", 1024)


LATE = """\
%called (p: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  ROOT %g = f32[16]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}, execution_thread="sparsecore"

%apart (q: f32[8]) -> f32[16] {
  %q = f32[8]{0} parameter(0)
  ROOT %custom = f32[16]{0} custom-call(%q), custom_call_target="TODO", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[8]) -> f32[16] {
  %a = f32[8]{0} parameter(0)
  %begin = ((), (), (s32[8]{0})) async-start(), async_execution_thread="sparsecore", calls=%apart
  %other = f32[8]{0} negate(%a)
  %fed = ((f32[8]{0}), f32[16]{0}, (s32[8]{0})) async-update(%begin, %a)
  ROOT %end = f32[16]{0} async-done(%fed)
}
"""


RELAID = """\
%relaid (r: bf16[32,64]) -> bf16[32,64] {
  %r = bf16[32,64]{1,0:T(16,128)(2,1)} parameter(0)
  ROOT %copied = bf16[32,64]{1,0:T(8,128)(2,1)} copy(%r)
}

%plain (q: bf16[64,64]) -> bf16[64,64] {
  %q = bf16[64,64]{1,0} parameter(0)
  ROOT %same = bf16[64,64]{1,0} bitcast(%q)
}

%row (stack: bf16[32,64], i: s32[]) -> bf16[1,64] {
  %stack = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %sliced = bf16[1,64]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,64}
}

%kept (k: bf16[32,64], u: bf16[1,64], j: s32[]) -> bf16[32,64] {
  %k = bf16[32,64]{1,0:T(16,128)(2,1)} parameter(0)
  %other = bf16[32,64]{1,0:T(8,128)(2,1)} fusion(%k), kind=kLoop, calls=%relaid
  %u = bf16[1,64]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %updated = bf16[32,64]{1,0} dynamic-update-slice(%other, %u, %j, %j)
}

%multiplied (m: bf16[32,64], n: s32[], w: bf16[64,64]) -> bf16[1,64] {
  %m = bf16[32,64]{1,0:T(16,128)(2,1)} parameter(0)
  %n = s32[] parameter(1)
  %turned = bf16[32,64]{1,0:T(8,128)(2,1)} fusion(%m), kind=kLoop, calls=%relaid
  %taken = bf16[1,64]{1,0} fusion(%turned, %n), kind=kLoop, calls=%row
  %w = bf16[64,64]{1,0} parameter(2)
  %whole = bf16[64,64]{1,0} fusion(%w), kind=kLoop, calls=%plain
  ROOT %product = bf16[1,64]{1,0} convolution(%taken, %whole), dim_labels=bf_io->bf
}

ENTRY %main (a: bf16[32,64], b: bf16[64,64]) -> bf16[32,64] {
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[64,64]{1,0} parameter(1)
  %at = s32[] constant(3)
  %found = bf16[1,64]{1,0} fusion(%a, %at, %b), kind=kOutput, calls=%multiplied
  ROOT %last = bf16[32,64]{1,0} fusion(%a, %found, %at), kind=kLoop, calls=%kept
}
"""


def test_another_layout_inside_a_fusion_moves_nothing() -> None:
    """Of a stack that is laid out anew a row is read or written; of an operand of a product, all."""
    product, kept = Program(RELAID).events
    assert isinstance(product, Op) and product.bytes == 2 * (64 + 64 * 64 + 64) + 4
    assert isinstance(kept, Op) and kept.bytes == 2 * (64 + 64) + 4


EXCHANGE = """\
ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %token = token[] after-all()
  %send.1 = (bf16[64,128]{1,0}, u32[]{:S(2)}, token[]) send(%a, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2,3}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[64,128]{1,0}, u32[]{:S(2)}, token[]) recv(%token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="psum.1_0"}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  %recv-done.1 = (bf16[64,128]{1,0}, token[]) recv-done(%recv.1), channel_id=1, is_host_transfer=true
  ROOT %sum = bf16[64,128]{1,0} get-tuple-element(%recv-done.1), index=0
}
"""


def test_slices_exchange_through_their_hosts() -> None:
    start, done = Program(EXCHANGE).events
    assert isinstance(start, Start) and not start.waits and done == Done("psum.1_0")
    assert start.collective == Collective("all-reduce", 64 * 128 * 2, (0, 16, 32), "psum.1_0")


def test_a_collective_begins_where_it_gets_its_operand() -> None:
    other, start, done = Program(LATE).events
    assert isinstance(other, Op) and isinstance(start, Start) and not start.waits
    assert start.collective.bytes == 64 and done == Done(start.collective.name)


def test_a_program_without_an_entry_is_named() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule m\n")


@pytest.mark.parametrize(("text", "group"), [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
    ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", (0, 4)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, x", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", tuple(range(8))),
    # 16 devices along fsdp, in a program whose axes come in another order than the mesh's.
    ("replica_groups=mesh['axis_0'=16,'axis_1'=4], device_ids=([4,16]T(1,0)) {'axis_0'}, x", tuple(range(16))),
    ("replica_groups=mesh['axis_0'=16,'axis_1'=4], device_ids=([4,16]T(1,0)) {'axis_1'}, x", (0, 16, 32, 48)),
    ("replica_groups=mesh['a'=8] {'a':(1)2}, x", (0, 4)),
    ("replica_groups=mesh['a'=8] {'a':(4)2}, x", (0, 1)),
    ("source_target_pairs={{3,1},{1,3}}, x", (1, 3)),
])
def test_groups_in_every_way_they_are_written(text: str, group: tuple[int, ...]) -> None:
    assert read_group(text) == group


def test_types() -> None:
    arrays = read_arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}, s4[8], token[])")
    assert [(array.bytes, array.hbm) for array in arrays] == [(12, 0), (4, 4), (4, 4), (0, 0)]


def product(left: str, right: str, out: str, rest: str) -> float:
    place = Computation()
    for line in (f"  %l = bf16[{left}]{{0}} parameter(0)", f"  %r = bf16[{right}]{{0}} parameter(1)",
                 f"  %c = bf16[{out}]{{0}} convolution(%l, %r), {rest}"):
        item = read_instruction(line)
        assert item
        place.instructions[item.name] = item
    return convolution_flops(place.instructions["c"], place)


@given(b=st.integers(1, 6), n=st.integers(1, 9), t=st.integers(1, 40), s=st.integers(1, 40), h=st.integers(1, 40))
def test_batched_products_are_written_as_windows(b: int, n: int, t: int, s: int, h: int) -> None:
    """q k of B rows and N heads: the compiler makes batch dims spatial ones, whose holes aren't products."""
    window = f"window={{size={b}x{n} stride={max(b - 1, 1)}x{max(n - 1, 1)} lhs_dilate={b}x{n}}}"
    found = product(f"{b},{n},{t},{h}", f"{b},{n},{s},{h}", f"{b},{n},{t},{s}", f"{window}, dim_labels=01bf_01oi->01bf")
    assert found == 2 * b * n * t * s * h


@given(dims=st.tuples(*[st.integers(1, 300)] * 3))
def test_plain_products(dims: tuple[int, int, int]) -> None:
    m, n, k = dims
    assert product(f"{m},{k}", f"{n},{k}", f"{m},{n}", "dim_labels=bf_oi->bf") == 2 * math.prod(dims)
    # A contraction over two dims: one of them is a window as wide as the input.
    found = product(f"{m},{k},4", f"{n},{k},4", f"{m},{n},1", "window={size=4}, dim_labels=bf0_oi0->bf0")
    assert found == 2 * math.prod(dims) * 4


def test_padding_is_no_product() -> None:
    assert product("1,8,1", "3,1,1", "1,8,1", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f") == 2 * (3 * 8 - 2)
