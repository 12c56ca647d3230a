"""Programs: functions of the macro loops become C functions, and nothing but them."""

import ctypes
import re

import pytest
from cpu_backend import python
from numba.core.errors import NumbaError

from fusedattn.cpu import kernel as kernels
from fusedattn.cpu.compile import compile_module, host_machine, load
from fusedattn.cpu.forward import worker
from fusedattn.cpu.kernel import Entry, emit_program, kernel
from fusedattn.cpu.memory import get_i64


@kernel("ii>ii")
def quotient(a, b):
    return a // b, a % b


@kernel("if>f")
def root(n, x):
    for _ in range(n):
        x = x**0.5
    return x


@kernel("i>b")
def is_even(a):
    return quotient(a, 2)[1] == 0


def mixed(at, n):
    total = 0
    for i in range(n):
        value = get_i64(at, i)
        total += quotient(value, 10)[0] if is_even(value) else int(root(2, float(value)))
    return total


def compiled(entry):
    program = load(compile_module(emit_program([entry]), host_machine()), [entry.name])
    return program, ctypes.CFUNCTYPE(*[ctypes.c_int64] * 3)(program.addresses[entry.name])


def test_a_program_computes_what_its_python_does():
    _keep, native = compiled(Entry("mixed", mixed, "ii>i"))
    values = (ctypes.c_int64 * 6)(16, 81, -7 * 2, 624, 257, 0)
    assert native(ctypes.addressof(values), 6) == 1 + 3 - 2 + 62 + 4 + 0


def defined(text):
    return re.findall(r"^define (?!internal)[^@]*@\"?([^\s\"(]+)", text, re.MULTILINE)


def test_a_program_shows_its_entries_alone():
    text = str(emit_program([Entry("one", mixed, "ii>i"), Entry("two", mixed, "ii>i")]))
    assert sorted(defined(text)) == ["one", "two"]


def test_the_worker_calls_nothing_of_python():
    """It runs without the GIL, and raises nothing."""
    module = emit_program([Entry("worker", worker, "ii>i")])
    compile_module(module, host_machine(), speed_level=1)
    missing = {function.name for function in module.functions if function.is_declaration}
    assert {name for name in missing if not name.startswith("llvm.")} <= {"log2", "exp2"}


def test_a_function_is_lowered_once_for_all_programs(monkeypatch):
    emit_program([Entry("first", mixed, "ii>i")])
    names = []
    compile_extra = kernels.compile_extra

    def counted(typing, target, function, *arguments, **options):
        names.append(function.__name__)
        return compile_extra(typing, target, function, *arguments, **options)

    monkeypatch.setattr(kernels, "compile_extra", counted)
    emit_program([Entry("second", mixed, "ii>i")])
    assert names == ["mixed"]


def test_who_turns_numbas_compiler_off_for_code_of_his_own_still_has_the_kernels():
    code = """
from fusedattn.cpu import lanes
from fusedattn.cpu.kernel import Entry, emit_program

def first(row, n):
    return lanes.row_interval(row, -2, 1, n, n)[0]

assert "define i64 @first" in str(emit_program([Entry("first", first, "ii>i")])).replace('"', "")

import numpy as np
import fusedattn

x = np.ones((1, 5, 8), np.float32)
try:
    fusedattn.attention(x, x, x, score_mod=lambda s, b, h, i, j: s * 2)
except RuntimeError as error:
    print(error)
"""
    assert "NUMBA_DISABLE_JIT" in python(code, NUMBA_DISABLE_JIT=1)


def test_a_call_with_the_wrong_arguments_is_refused():
    def wrong(a, b):
        return quotient(a)[0] + b

    with pytest.raises(NumbaError, match="argument"):
        emit_program([Entry("wrong", wrong, "ii>i")])
