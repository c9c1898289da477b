"""The roofline over HLO against programs small enough to count by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments/benchmarks"))
from roofline import H100, Card, Kernel, Roofline, dimensions, roofline, size_of, table

CARD = Card("ten a second", 1e9, 10.0, {"bf16": 100.0, "f32": 50.0}, 20.0, launch_seconds=0.5)

LOOP = """
HloModule jit_loop

%added (p0: f32[8,4], p1: f32[4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  %wide = f32[8,4]{1,0} broadcast(%p1), dimensions={1}
  %product = f32[8,4]{1,0} multiply(%p0, %wide)
  ROOT %sum = f32[8,4]{1,0} add(%product, %p0)
}

%sliced (p0.1: f32[100,4], p1.1: s32[]) -> f32[1,4] {
  %p0.1 = f32[100,4]{1,0} parameter(0)
  %p1.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,4]{1,0} dynamic-slice(%p0.1, %p1.1, %zero), dynamic_slice_sizes={1,4}
  ROOT %root = f32[1,4]{1,0} negate(%row)
}

%updated (p0.2: f32[100,4], p1.2: f32[1,4], p2.2: s32[]) -> f32[100,4] {
  %p0.2 = f32[100,4]{1,0} parameter(0)
  %p1.2 = f32[1,4]{1,0} parameter(1)
  %p2.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  ROOT %put = f32[100,4]{1,0} dynamic-update-slice(%p0.2, %p1.2, %p2.2, %zero.2)
}

%shifted (p0.3: bf16[16]) -> bf16[12] {
  %p0.3 = bf16[16]{0} parameter(0)
  %doubled = bf16[16]{0} add(%p0.3, %p0.3)
  %left = bf16[12]{0} slice(%doubled), slice={[0:12]}
  %right = bf16[12]{0} slice(%doubled), slice={[4:16]}
  ROOT %both = bf16[12]{0} multiply(%left, %right)
}

%body (state: (s32[], f32[8,4], f32[4])) -> (s32[], f32[8,4], f32[4]) {
  %state = (s32[], f32[8,4]{1,0}, f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %w = f32[4]{0} get-tuple-element(%state), index=2
  %fusion = f32[8,4]{1,0} fusion(%x, %w), kind=kLoop, calls=%added, metadata={op_name="jit(loop)/add"}
  ROOT %next = (s32[], f32[8,4]{1,0}, f32[4]{0}) tuple(%i, %fusion, %w)
}

%condition (state.1: (s32[], f32[8,4], f32[4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}, f32[4]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: bf16[8,16], b: bf16[16,4], w.1: f32[4], rows: f32[100,4], n: s32[], v: bf16[16]) -> f32[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %w.1 = f32[4]{0} parameter(2)
  %rows = f32[100,4]{1,0} parameter(3)
  %n = s32[] parameter(4)
  %v = bf16[16]{0} parameter(5)
  %dot = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %start = (s32[], f32[8,4]{1,0}, f32[4]{0}) tuple(%n, %dot, %w.1)
  %while = (s32[], f32[8,4]{1,0}, f32[4]{0}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(loop)/while"}, backend_config={"known_trip_count":{"n":"7"}}
  %one = f32[1,4]{1,0} fusion(%rows, %n), kind=kLoop, calls=%sliced
  %all = f32[100,4]{1,0} fusion(%rows, %one, %n), kind=kLoop, calls=%updated
  %shift = bf16[12]{0} fusion(%v), kind=kLoop, calls=%shifted
  ROOT %found = f32[8,4]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in roofline(LOOP).kernels}


def test_sizes():
    assert size_of("bf16[8,16]{1,0}") == 256
    assert size_of("(s32[], f32[8,4]{1,0}, pred[3])") == 4 + 128 + 3
    assert dimensions("(s32[], bf16[2,3])") == [[], [2, 3]]


def test_only_kernels_count_and_loops_count_their_turns(kernels):
    assert set(kernels) == {"dot", "fusion", "one", "all", "shift"}
    assert kernels["fusion"].times == 7
    assert all(kernel.times == 1 for name, kernel in kernels.items() if name != "fusion")


def test_a_product_counts_its_flop_and_its_operands(kernels):
    dot = kernels["dot"]
    assert (dot.flop, dot.products) == (2 * 8 * 4 * 16, "bf16")
    assert dot.bytes == 2 * (8 * 16 + 16 * 4) + 4 * 8 * 4
    assert dot.operations == 0


def test_a_fusion_counts_what_goes_in_and_out_and_a_fused_multiply_once(kernels):
    fusion = kernels["fusion"]
    assert fusion.bytes == 128 + 16 + 128
    assert fusion.operations == 8 * 4  # the multiplication is a part of the addition
    assert fusion.flop == 0


def test_slices_and_updates_in_place_count_what_they_touch(kernels):
    assert kernels["one"].bytes == 16 + 4 + 16
    assert kernels["all"].bytes == 16 + 4 + 16
    assert kernels["one"].operations == 4


def test_what_is_read_at_two_shifts_is_computed_twice(kernels):
    assert kernels["shift"].operations == 2 * 12 + 12
    assert kernels["shift"].bytes == 2 * 12 * 2 + 2 * 12 or kernels["shift"].bytes == 32 + 24


def test_a_kernel_takes_its_longest_part_and_a_launch(kernels):
    dot = kernels["dot"]
    parts = {"bytes": 512 / 10, "products": 1024 / 100}
    assert dot.seconds(CARD) == pytest.approx(max(parts.values()) + 0.5)
    assert dot.bound(CARD) == "bytes"
    fast = Card("fast", 1e9, 1e9, {"bf16": 100.0}, 20.0, 0.5)
    assert dot.seconds(fast) == pytest.approx(10.24 + 0.5)
    assert dot.bound(fast) == "products"
    slow = Card("slow to launch", 1e9, 1e9, {"bf16": 1e9}, 1e9, 60.0)
    assert dot.bound(slow) == "launches"


PALLAS = r"""
HloModule jit_pallas

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %call = f32[8,4]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 5 : i32, grid_y = 1 : i32, grid_z = 2 : i32, name = "kernel", NAMEmetadata = "{\22flop\22: \2260.0\22, \22operations\22: \223\22, \22loaded\22: \2240\22}"}
}
"""  # noqa: E501


@pytest.mark.parametrize("name", ["", "serialized_"])  # as jax names it since 0.11, and before
def test_a_pallas_kernel_is_what_it_states_of_each_program(name):
    (kernel,) = roofline(PALLAS.replace("NAME", name)).kernels
    assert (kernel.flop, kernel.operations, kernel.loaded) == (600, 30, 400)
    assert (kernel.bytes, kernel.products) == (2 * 8 * 4 * 4, "f32")
    cached = replace(CARD, cached_bytes_per_second=10.0)
    assert kernel.seconds(cached) == pytest.approx(400 / 10 + 0.5)
    assert kernel.bound(cached) == "cache"
    assert kernel.bound(CARD) == "bytes"


def test_shares_add_up_and_the_loop_is_told(kernels):
    program = Roofline(list(kernels.values()))
    assert sum(program.shares(CARD).values()) == pytest.approx(1)
    assert program.launches == 11
    assert program.seconds(CARD) == pytest.approx(
        sum(kernel.times * kernel.seconds(CARD) for kernel in kernels.values())
    )
    assert [len(own) for own in program.loops().values()] == [4, 1]
    lines = table(program, CARD, 2).splitlines()
    assert lines[3].startswith("| 7 | 1 |")
    assert sum("fusion f32[8,4]" in line for line in lines) == 1


def test_turns_of_a_loop_of_unknown_length_are_given():
    text = LOOP.replace('"known_trip_count":{"n":"7"}', "")
    assert roofline(text).launches == 5
    assert roofline(text, {"nothing": 9, r"loop\)/while": 3}).launches == 4 + 3


def test_convolutions_count_in_every_direction():
    line = (
        "ENTRY %main (x: f32[2,8,8,3], k: f32[3,3,3,5]) -> f32[2,8,8,5] {{\n"
        "  %x = f32[2,8,8,3]{{3,2,1,0}} parameter(0)\n"
        "  %k = f32[3,3,3,5]{{3,2,1,0}} parameter(1)\n"
        "  ROOT %c = {out}{{3,2,1,0}} {what}, window={{size=3x3 pad=1_1x1_1}}, "
        "dim_labels=b01f_01io->b01f{target}\n}}\n"
    )
    flop = 2 * 2 * 8 * 8 * 5 * 27
    forward = line.format(out="f32[2,8,8,5]", what="convolution(%x, %k)", target="")
    assert roofline(forward).total("flop") == flop
    by_cudnn = line.format(
        out="f32[2,8,8,5]",
        what="custom-call(%x, %k)",
        target=', custom_call_target="__cudnn$convForward"',
    )
    assert roofline(by_cudnn).total("flop") == flop
    backward = by_cudnn.replace("convForward", "convBackwardFilter").replace(
        "x: f32[2,8,8,3], k: f32[3,3,3,5]", "x: f32[2,8,8,3], k: f32[2,8,8,5]"
    )
    backward = backward.replace("%k = f32[3,3,3,5]", "%k = f32[2,8,8,5]").replace(
        "%c = f32[2,8,8,5]", "%c = f32[3,3,3,5]"
    )
    assert roofline(backward).total("flop") == flop
    to_images = by_cudnn.replace("convForward", "convBackwardInput").replace(
        "%x = f32[2,8,8,3]", "%x = f32[2,8,8,5]"
    )
    to_images = to_images.replace("%c = f32[2,8,8,5]", "%c = f32[2,8,8,3]")
    assert roofline(to_images).total("flop") == flop


def test_what_is_not_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        roofline("not a module")


def test_a_program_of_this_machine_counts_as_written():
    def steps(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)

    text = jax.jit(steps).lower(jnp.ones((16, 8)), jnp.ones((8, 8))).compile().as_text()
    assert roofline(text).total("flop") == 5 * 2 * 16 * 8 * 8
    assert roofline(text).seconds(H100) > 0
