"""What the tests of the CPU backend share: any vector unit's tiles, and fresh processes."""

import contextlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import note

from fusedattn import attention, attention_backward
from fusedattn.cpu import tile
from fusedattn.cpu.backend import CPU
from fusedattn.problem import make_problem
from fusedattn.testing import EVERYTHING, Case, Kernel

DTYPES = ("float32", "bfloat16", "float16", "float64")

# LLVM makes any tile run on any machine: wide vectors become several narrow ones.
ISAS = (tile.AVX512, tile.AVX2, tile.SIMD128)
each_isa = pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])


# What this thread pretends to run on. A patch for a while would not do: of two threads, the second
# to go would put back what the first had put there.
_pretended = threading.local()
_host_isa = tile.host_isa


def _pretended_isa():
    return getattr(_pretended, "isa", None) or _host_isa()


_pretended_isa.__wrapped__ = _host_isa.__wrapped__
tile.host_isa = _pretended_isa


@contextlib.contextmanager
def pretended(isa):
    """Have this thread's calls take the kernels for another vector unit."""
    before = getattr(_pretended, "isa", None)
    _pretended.isa = isa
    try:
        yield
    finally:
        _pretended.isa = before


def attention_on(isa):
    """`fusedattn.attention` by the kernels for one vector unit."""

    def attention(q, k, v, *, out=None, **options):
        problem = make_problem(q, k, v, out=out, **options)
        with pretended(isa):
            result = CPU.forward(problem)
        written = problem.restore(result.out) if out is None else out
        return written if result.lse is None else (written, result.lse)

    return attention


def kernel_on(isa, dtypes=DTYPES):
    """The same as a kernel that is held to every promise."""
    return Kernel(attention_on(isa), supports=EVERYTHING, dtypes=dtypes, bitwise=True)


def gradient_on(isa):
    """`fusedattn.attention_backward` by the kernels for one vector unit."""

    def gradient(*arrays, **options):
        with pretended(isa):
            return attention_backward(*arrays, **options, backend="cpu")

    return gradient


def came_back(q, k, v, **options):
    """What a gradient is called with: arrays, and options with a d_lse."""
    out, lse = attention(q, k, v, **options, return_lse=True)
    d_out, d_lse = normal(91, *out.shape, dtype=out.dtype), normal(92, *lse.shape, dtype=lse.dtype)
    return (d_out, q, k, v, out, lse), {**options, "d_lse": d_lse}


def gradient_kernel_on(isa, dtypes=DTYPES):
    """Both as a kernel whose gradients are judged."""
    supports = EVERYTHING | {"d_lse"}
    gradient = gradient_on(isa)
    return Kernel(attention_on(isa), supports=supports, dtypes=dtypes, gradient=gradient)


def on_every_unit(law, case):
    """Hold the kernels for every vector unit to a law on a case, whose reference they share."""
    for isa in ISAS:
        note(isa.name)
        law(kernel_on(isa), case)


def bits(array):
    """The bits of an array, as integers: they tell -0.0 from 0.0 and one NaN from another."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def assert_same_bits(actual, expected):
    """Assert that two arrays (or pairs of out and lse) hold the same bits; NaN equals NaN."""
    if isinstance(actual, tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)
        return
    if actual is expected is None:
        return
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    same = (bits(actual) == bits(expected)) | (np.isnan(actual) & np.isnan(expected))
    assert same.all(), f"{(~same).sum()} of {same.size} differ, first at {np.argwhere(~same)[0]}"


def normal(seed, *shape, dtype=np.float32):
    """Normal numbers from a seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def operands(dtype="float32", batch=2, heads=2, heads_kv=1, rows=300, keys=400, dim=40, dim_v=33):
    """Return q, k and v: by default some panels of rows and blocks of keys, not all full."""
    shapes = (heads, rows, dim), (heads_kv, keys, dim), (heads_kv, keys, dim_v)
    return [normal(i, batch, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def head_dims(dim, dtype="float32"):
    """Return a call of one head_dim, and of the head_dim_v that is as far from the other end."""
    return Case(
        normal(dim, 1, 20, dim, dtype=dtype),
        normal(dim + 1, 1, 35, dim, dtype=dtype),
        normal(dim + 2, 1, 35, 577 - dim, dtype=dtype),
        {"causal": True},
    )


# A shell starts its background jobs deaf to Ctrl-C, and so would be what they start.
HEAR_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def process(code, *arguments, **environment):
    """Start a fresh interpreter on some code; keyword arguments set environment variables."""
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.Popen(
        [sys.executable, "-c", HEAR_CTRL_C + code, *map(str, arguments)],
        env={name: value for name, value in variables.items() if value != "None"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child, seconds=120):
    """Wait for a process; return its output if it ended well and said nothing on stderr."""
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        raise AssertionError(f"still running after {seconds} s: {child.communicate()}") from None
    assert (child.returncode, err) == (0, ""), f"exit {child.returncode}: {err}"
    return out


def python(code, *arguments, **environment):
    """Run some code in a fresh interpreter and return what it prints."""
    return finish(process(code, *arguments, **environment))
