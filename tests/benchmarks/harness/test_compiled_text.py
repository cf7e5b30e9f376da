"""Kernels and bytes of compiled programs, on texts that a pencil can check."""

from __future__ import annotations

import pytest

from benchmarks.harness.compiled_text import CompiledText, Kernel

pytestmark = pytest.mark.quick

LOOP = """
%fused_store (param_1: f32[8,4], param_0: f32[4], param_2: s32[]) -> f32[8,4] {
  %param_1 = f32[8,4]{1,0} parameter(0)
  %param_2 = s32[] parameter(2)
  %param_0 = f32[4]{0} parameter(1)
  %row = f32[1,4]{1,0} bitcast(%param_0)
  ROOT %store.1 = f32[8,4]{1,0} dynamic-update-slice(%param_1, %row, %param_2, %param_2)
}

%fused_read (param_0.1: f32[8,4], param_1.1: s32[]) -> (f16[4], f32[4]) {
  %param_0.1 = f32[8,4]{1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %slice.1 = f32[1,4]{1,0} dynamic-slice(%param_0.1, %param_1.1, %param_1.1), dynamic_slice_sizes={1,4}
  %flat = f32[4]{0} bitcast(%slice.1)
  %half = f16[4]{0} convert(%flat)
  ROOT %both = (f16[4]{0}, f32[4]{0}) tuple(%half, %flat)
}

%body.1 (loop: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %loop = (s32[], f32[8,4]{1,0}) parameter(0)
  %step = s32[] get-tuple-element(%loop), index=0
  %stored = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %read_fusion.7 = (f16[4]{0}, f32[4]{0}) fusion(%stored, %step), kind=kLoop, calls=%fused_read
  %second = f32[4]{0} get-tuple-element(%read_fusion.7), index=1
  %gemm.3 = (f32[4]{0}, s8[1024]{0}) custom-call(%second), custom_call_target="__cublas$lt$matmul"
  %product = f32[4]{0} get-tuple-element(%gemm.3), index=0
  %store_fusion.2.1 = f32[8,4]{1,0} fusion(%stored, %product, %step), kind=kLoop, calls=%fused_store
  ROOT %after = (s32[], f32[8,4]{1,0}) tuple(%step, %store_fusion.2.1)
}

%condition.1 (loop.1: (s32[], f32[8,4])) -> pred[] {
  %loop.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

%inner (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %copy.9 = f32[8,4]{1,0} copy(%x)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %called = f32[8,4]{1,0} call(%a), to_apply=%inner
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %called)
  %while.1 = (s32[], /*index=1*/f32[8,4]{1,0}) while(%start), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_a_loop_runs_its_kernels_as_often_as_it_does_and_slices_are_what_they_move():
    assert list(CompiledText(LOOP).kernels()) == [
        Kernel("copy", 1, 2 * 128),
        Kernel("read_fusion", 8, 16 + 4 + (8 + 16)),  # a row and the step; both results
        Kernel("gemm", 8, 16 + 16),  # without what it works in
        Kernel("store_fusion", 8, (16 + 4) + 16),  # in place: the new row and the step; the row
    ]


def test_of_a_branch_the_longer_one_counts():
    text = """
%one (x: f32[2]) -> f32[2] {
  ROOT %x = f32[2]{0} parameter(0)
}

%other (y: f32[2]) -> f32[2] {
  %y = f32[2]{0} parameter(0)
  ROOT %negate.1 = f32[2]{0} negate(%y)
}

ENTRY %main (a: f32[2], p: s32[]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %p = s32[] parameter(1)
  ROOT %choice = f32[2]{0} conditional(%p, %a, %a), branch_computations={%one, %other}
}
"""
    assert list(CompiledText(text).kernels()) == [Kernel("negate", 1, 16)]


def test_of_what_is_gathered_and_scattered_only_that_moves():
    text = """
%fused (p0: f32[100,4], p1: s32[3], p2: f32[3,4], p3: f32[100,4]) -> f32[100,4] {
  %p0 = f32[100,4]{1,0} parameter(0)
  %p1 = s32[3]{0} parameter(1)
  %p2 = f32[3,4]{1,0} parameter(2)
  %p3 = f32[100,4]{1,0} parameter(3)
  %rows = f32[3,4]{1,0} gather(%p0, %p1), slice_sizes={1,4}
  %added = f32[3,4]{1,0} add(%rows, %p2)
  ROOT %out = f32[100,4]{1,0} scatter(%p3, %p1, %added), to_apply=%sum
}

ENTRY %main (a: f32[100,4], i: s32[3], b: f32[3,4]) -> f32[100,4] {
  %a = f32[100,4]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  %b = f32[3,4]{1,0} parameter(2)
  ROOT %scatter_fusion = f32[100,4]{1,0} fusion(%a, %i, %b, %a), kind=kInput, calls=%fused
}
"""
    # The rows of the first, ids, what is added; in place, what is written.
    assert list(CompiledText(text).kernels()) == [Kernel("scatter_fusion", 1, 48 + 12 + 48 + 48)]
