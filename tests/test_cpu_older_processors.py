"""Processors with fewer instructions: the same answers, and never the end of the process."""

import ctypes

import llvmlite.binding as llvm
import numpy as np
import pytest
from cpu_backend import python

from fusedattn.cpu.compile import host_machine
from fusedattn.cpu.half import link_half

CALL = """
import sys
import ml_dtypes
import numpy as np
import fusedattn
from fusedattn.cpu.tile import host_isa
from fusedattn.problem import make_problem
from fusedattn.reference import forward
from fusedattn.testing import assert_within, forward_budget
rng = np.random.default_rng(0)
for dtype in sys.argv[1].split():
    for rows, options in ((2, {}), (70, {"causal": True, "softcap": 3.0})):
        q = rng.standard_normal((2, rows, 24)).astype(dtype)
        k, v = rng.standard_normal((2, 2, 130, 24)).astype(dtype)
        v[0, 5, 3] = np.inf  # the rescue as well
        bias = rng.standard_normal(130).astype(np.float16)
        bias[5] = -np.inf
        options = {**options, "bias": bias, "return_lse": True}
        expected, budget = (f(make_problem(q, k, v, **options)) for f in (forward, forward_budget))
        out, lse = fusedattn.attention(q, k, v, **options)
        assert_within(out, expected.out, 2 * budget.out)
        assert_within(lse, expected.lse, 2 * budget.lse)
print(host_isa().name)
"""


@pytest.mark.deep
def test_a_processor_of_the_oldest_kind(tmp_path):
    """No FMA, no conversion of float16: LLVM calls functions, which must be there."""
    environment = {"NUMBA_CPU_NAME": "generic", "FUSEDATTN_CACHE_DIR": tmp_path}
    assert python(CALL, "float16", **environment) == "128-bit SIMD\n"
    # Now from the cache.
    assert python(CALL, "float16", **environment) == "128-bit SIMD\n"


AVX2 = "+avx2,+fma,+f16c,+avx,+sse4.2,+popcnt,+bmi,+bmi2,-avx512f"


@pytest.mark.deep
@pytest.mark.parametrize(
    ("name", "features", "isa"),
    [
        ("generic", "", "128-bit SIMD"),
        ("haswell", AVX2, "AVX2"),
        ("sandybridge", "", "128-bit SIMD"),
    ],
)
def test_every_type_on_older_processors(tmp_path, name, features, isa):
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    code = python(
        CALL, "float32 float64 float16 bfloat16", **environment, FUSEDATTN_CACHE_DIR=tmp_path
    )
    assert code == f"{isa}\n"


CONVERT = """
define void @extend(half* %p, float* %q) {
  %h = load half, half* %p
  %f = fpext half %h to float
  store float %f, float* %q
  ret void
}
define void @truncate(float* %q, half* %p) {
  %f = load float, float* %q
  %h = fptrunc float %f to half
  store half %h, half* %p
  ret void
}
define void @each(void (i8*, i8*)* %f, i8* %p, i64 %m, i8* %q, i64 %n, i64 %count) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %a = mul i64 %i, %m
  %b = mul i64 %i, %n
  %x = getelementptr i8, i8* %p, i64 %a
  %y = getelementptr i8, i8* %q, i64 %b
  call void %f(i8* %x, i8* %y)
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %end
end:
  ret void
}
"""


@pytest.fixture(scope="module")
def convert():
    """Conversion by our functions, as code for a processor without instructions calls them."""
    if not llvm.get_process_triple().startswith("x86_64"):
        pytest.skip("other processors have the instructions")
    engines = [link_half(host_machine("generic", ""))]
    module = llvm.parse_assembly(CONVERT)
    engines.append(llvm.create_mcjit_compiler(module, host_machine("generic", "")))
    engines[1].finalize_object()
    address = engines[1].get_function_address
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    kind = ctypes.CFUNCTYPE(None, pointer, pointer, integer, pointer, integer, integer)
    each = kind(address("each"))

    def call(name, source, dtype):
        target = np.empty(source.shape, dtype)
        arguments = (source.ctypes.data, source.itemsize, target.ctypes.data, target.itemsize)
        each(address(name), *arguments, source.size)
        return target

    call.engines = engines
    return call


def assert_equal_numbers(actual, expected):
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    bits = f"u{actual.itemsize}"
    np.testing.assert_array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def test_every_half_becomes_the_float_of_its_value(convert):
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert_equal_numbers(convert("extend", halves, np.float32), halves.astype(np.float32))


def test_floats_become_the_nearest_half(convert):
    """All halves, all middles between two of them, and what lies just beside."""
    high = np.arange(2**19, dtype=np.uint32) << 13
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32)
    floats = (high[:, None] | low).ravel().view(np.float32)
    with np.errstate(all="ignore"):
        expected = floats.astype(np.float16)
    assert_equal_numbers(convert("truncate", floats, np.float16), expected)
