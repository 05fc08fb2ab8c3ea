"""What is read from a compiled program's text."""

from experiments.benchmarks import described

PROGRAM = """
%fused (x: s8[8,16], w: s8[16,32]) -> s8[8,32] {
  %x = s8[8,16]{1,0} parameter(0)
  %w = s8[16,32]{1,0} parameter(1)
  ROOT %c = s32[8,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

ENTRY %main (x: s8[8,16]) -> (f32[8], s8[8,32]) {
  %a = s8[8,32]{1,0:T(8,128)} fusion(%x), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/dense"}, backend_config={"estimated_cycles":"300"}
  %b = (f32[8]{0}, s8[8,32]{1,0}) fusion(%a), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"500"}
  %c = s8[8,32]{1,0} copy(%b), backend_config={"estimated_cycles":"9223372036854775807"}
}
"""  # noqa: E501


def test_cycles_by_kind():
    assert described.cycles(PROGRAM) == {"convolution fusion to s8": 300, "loop fusion to f32": 500}


def test_the_largest_operations():
    both = [(500, "f32[8], s8[8,32]", ""), (300, "s8[8,32]", "jit(f)/dense")]
    assert described.largest(PROGRAM, 5) == both
    assert described.largest(PROGRAM, 1) == both[:1]


def test_products_by_types():
    assert described.products(PROGRAM) == {"int8 outside": 1}
