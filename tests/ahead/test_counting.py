"""The counts of test_traffic.py, where the bytes are known."""

import jax
import jax.numpy as jnp
from helpers.hlo import parse
from helpers.pallas import Kernels
from helpers.traffic import Traffic, decode_traffic
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

PROGRAM = """HloModule hand_made

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%rows (table: bf16[128,64,32], ids: s32[8], x: bf16[32]) -> f32[8,64] {
  %table = bf16[128,64,32] parameter(0)
  %ids = s32[8] parameter(1)
  %x = bf16[32] parameter(2)
  %found = bf16[8,64,32] gather(%table, %ids), offset_dims={1,2}, slice_sizes={1,64,32}
  %wide = f32[8,64,32] convert(%found)
  %spread = bf16[8,64,32] broadcast(%x), dimensions={2}
  %spread_wide = f32[8,64,32] convert(%spread)
  %product = f32[8,64,32] multiply(%wide, %spread_wide)
  %zero = f32[] constant(0)
  ROOT %y = f32[8,64] reduce(%product, %zero), dimensions={2}, to_apply=%sum
}

%write (held: s8[4,1024], new: s8[4,1], at: s32[]) -> s8[4,1024] {
  %held = s8[4,1024] parameter(0)
  %new = s8[4,1] parameter(1)
  %at = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %updated = s8[4,1024] dynamic-update-slice(%held, %new, %none, %at)
}

%idle (nothing: ()) -> f32[8,64] {
  %nothing = () parameter(0)
  %zero.1 = f32[] constant(0)
  ROOT %zeros = f32[8,64] broadcast(%zero.1), dimensions={}
}

%busy (held.1: (f32[8,64])) -> f32[8,64] {
  %held.1 = (f32[8,64]) parameter(0)
  %element = f32[8,64] get-tuple-element(%held.1), index=0
  ROOT %negated = f32[8,64] negate(%element)
}

%inner_condition (s: (s32[], f32[8,64])) -> pred[] {
  %s = (s32[], f32[8,64]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %bound = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%inner_body (s.1: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %s.1 = (s32[], f32[8,64]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %y.1 = f32[8,64] get-tuple-element(%s.1), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %copied = f32[8,64] copy(%y.1)
  ROOT %both = (s32[], f32[8,64]) tuple(%next, %copied)
}

%condition (state: (s32[], s8[4,1024], bf16[128,64,32])) -> pred[] {
  %state = (s32[], s8[4,1024], bf16[128,64,32]) parameter(0)
  %done = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(16)
  ROOT %go = pred[] compare(%done, %end), direction=LT
}

%body (state.1: (s32[], s8[4,1024], bf16[128,64,32])) -> (s32[], s8[4,1024], bf16[128,64,32]) {
  %state.1 = (s32[], s8[4,1024], bf16[128,64,32]) parameter(0)
  %step = s32[] get-tuple-element(%state.1), index=0
  %cache = s8[4,1024] get-tuple-element(%state.1), index=1
  %weights = bf16[128,64,32] get-tuple-element(%state.1), index=2
  %chosen = s32[8]{0:S(1)} constant({...})
  %token = bf16[32]{0:S(1)} constant({...})
  %new.1 = s8[4,1]{1,0:S(1)} constant({...})
  %scalar = s32[]{:S(1)} constant(5)
  %out = f32[8,64] fusion(%weights, %chosen, %token), kind=kLoop, calls=%rows
  %cache.1 = s8[4,1024] fusion(%cache, %new.1, %scalar), kind=kLoop, calls=%write
  %no = () tuple()
  %yes = (f32[8,64]) tuple(%out)
  %if = f32[8,64]{1,0:S(1)} conditional(%scalar, %no, %yes), branch_computations={%idle, %busy}
  %start = (s32[], f32[8,64]) tuple(%scalar, %out)
  %while.1 = (s32[], f32[8,64]) while(%start), condition=%inner_condition, body=%inner_body
  ROOT %after = (s32[], s8[4,1024], bf16[128,64,32]) tuple(%step, %cache.1, %weights)
}

ENTRY %main (cache.2: s8[4,1024], weights.1: bf16[128,64,32]) -> s8[4,1024] {
  %cache.2 = s8[4,1024] parameter(0)
  %weights.1 = bf16[128,64,32] parameter(1)
  %zero.2 = s32[] constant(0)
  %begin = (s32[], s8[4,1024], bf16[128,64,32]) tuple(%zero.2, %cache.2, %weights.1)
  %loop = (s32[], s8[4,1024], bf16[128,64,32]) while(%begin), condition=%condition, body=%body
  %last = s8[4,1024] get-tuple-element(%loop), index=1
  ROOT %padded = s8[4,1024]{1,0:T(32,128)(4,1)} copy(%last)
}
"""


def test_the_bytes_of_a_program_written_by_hand():
    def nothing(call, operands):
        raise AssertionError("there is no kernel")

    found = decode_traffic(PROGRAM, nothing, segment=16, taken=0.25)
    matrices, rows = 8 * 64 * 32 * 2, 8 * 64 * 4
    assert found["fusion out"] == Traffic(matrices, rows)
    assert found["fusion cache.1"] == Traffic(0, 4)  # four entries of a thousand
    assert found["conditional if"].read == 0.25 * rows + 0.75 * 4
    # Two counters and the bound are read each time.
    assert found["while while.1"] == Traffic(3 * (rows + 16), 3 * (rows + 5))
    # A tile of 32 rows is whole where eight are used.
    assert found["copy padded, once a segment"] == Traffic(4 * 1024 / 16, 32 * 1024 / 16)


def counted_kernel(kernel, target, shape, visible):
    """The traffic of a kernel from an array of float32 to another."""
    traced = jax.jit(kernel).trace(jax.ShapeDtypeStruct(shape, jnp.float32))
    x = f"f32[{','.join(map(str, shape))}]"
    entry = parse(
        f"ENTRY %main (x: {x}) -> f32[] {{\n"
        f"  %x = {x} parameter(0)\n"
        f'  ROOT %y = f32[] custom-call(%x), custom_call_target="{target}"\n}}'
    ).entry
    return Kernels(traced, visible)(entry["y"], [entry["x"]])


def test_the_blocks_of_a_kernel_written_by_hand():
    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    kernel = pl.pallas_call(
        copy,
        grid=(2, 3),
        in_specs=[pl.BlockSpec((8, 128), lambda i, j: (i, 0))],  # fetched twice
        out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((16, 384), jnp.float32),
    )
    found = counted_kernel(kernel, "tpu_custom_call", (16, 128), {})
    assert found == Traffic(2 * 8 * 128 * 4, 6 * 8 * 128 * 4)


def test_a_loop_within_a_kernel_reads_what_is_visible():
    def sum_rows(x_ref, y_ref):
        def add(i, acc):
            return acc + jnp.sum(plgpu.load(x_ref.at[pl.ds(i * 16, 16)]), axis=0)

        first = pl.program_id(1)
        y_ref[...] = jax.lax.fori_loop(first, first + 1, add, jnp.zeros(8)) + x_ref[0]

    kernel = pl.pallas_call(
        sum_rows,
        grid=(2, 4),
        in_specs=[pl.BlockSpec((None, 64, 8), lambda i, j: (i, 0, 0))],
        out_specs=pl.BlockSpec((None, None, 8), lambda i, j: (i, j, 0)),
        out_shape=jax.ShapeDtypeStruct((2, 4, 8), jnp.float32),
    )
    found = counted_kernel(kernel, "__gpu$xla.gpu.triton", (2, 64, 8), {64: 40})
    # Three tiles have the 40 visible rows. Each of eight programs also reads the first row.
    assert found == Traffic(2 * 48 * 8 * 4 + 8 * 8 * 4, 8 * 8 * 4)
