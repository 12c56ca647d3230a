"""The emulator of the Hopper kernel knows the right answers, and sees what a kernel does wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
from hopper_emulator import run
from hopper_emulator.machine import Fault
from hopper_emulator.memory import SHARED_BASE, Global
from hopper_emulator.programs import compiled
from test_cuda_hopper import assert_right, operands

from fusedattn.cuda import ptx
from fusedattn.cuda.inline import Op


def nothing(*_):
    """Stand for an instruction that has been forgotten."""


def forgets(*ops):
    """Return what makes a kernel without some instructions."""
    return lambda tools, op: nothing if op in ops else None


def forgets_text(name):
    """Return what makes a kernel without the instructions that are called so."""
    return lambda tools, op: nothing if name in op.text else None


def text_with(old, new):
    """Return what makes a kernel that says something else."""

    def changed(tools, op):
        if old in op.text:
            return compiled(op._replace(text=op.text.replace(old, new)), tools)
        return None

    return changed


def one_key_more(tools, function):
    """Let each row see a key more than it does."""

    def wider(*arguments):
        low, high = function(*arguments)
        return low, high + 1

    return wider if function.__name__ == "row_interval" else function


FAULTS = {
    "nobody says that keys are done with": (forgets(ptx.BARRIER_ARRIVE), "deadlock: .* parity"),
    "nobody waits for loads": (forgets(ptx.BARRIER_WAIT), "."),
    "too few bytes are awaited": (
        text_with("expect_tx.shared::cta.b64 _, [$0], $1", "expect_tx.shared::cta.b64 _, [$0], 64"),
        "deadlock",
    ),
    "no fence tells of barriers": (forgets(ptx.BARRIER_INIT_FENCE), "no fence has told"),
    "no fence tells of zeros": (forgets(ptx.PROXY_FENCE), "without a fence"),
    "no fence before products": (text_with("wgmma.fence.sync.aligned;", ""), "without wgmma.fence"),
    "zeros may come late": (text_with("bar.sync 1, 256", "bar.sync 1, 1"), "."),
    "products are not waited for": (
        forgets_text("wgmma.wait_group.sync.aligned 0"),
        "deadlock|was written|under way",
    ),
    "all products but one are waited for": (
        text_with("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"),
        ".",
    ),
    "values are not transposed": (
        text_with("1, 1, 1, 1;", "1, 1, 1, 0;"),
        "beyond shared memory|Not equal",
    ),
    "the second step of keys is the first": (text_with(", 2;\nmov", ", 0;\nmov"), "Not equal"),
    "scores are added to the last ones": (text_with("p, 0, 0;", "p, 1, 0;"), "Not equal"),
    "registers are taken before they are given": (
        forgets_text("setmaxnreg.dec"),
        "deadlock: .* registers",
    ),
    "weights are halves of another type": (text_with("cvt.rn.f16x2", "cvt.rn.bf16x2"), "Not equal"),
    "the upper half comes first": (text_with("$0, $2, $1;", "$0, $1, $2;"), "Not equal"),
    "lanes 2 apart do not meet": (
        text_with("bfly.b32 $0, $1, 2", "bfly.b32 $0, $1, 1"),
        "Not equal",
    ),
    "a row is written past the end": (
        text_with("[$0], {$1, $2}", "[$0+4096], {$1, $2}"),
        "lie in no array",
    ),
}

# Mistakes with results of a half type, with turns, and with what is hidden by intervals.
OTHER_FAULTS = {
    "words stay where they are": (
        text_with("selp.b32 word, $0, $1", "selp.b32 word, $1, $0"),
        "Not equal",
    ),
    "words go to the wrong thread": (text_with("word, word, 2,", "word, word, 1,"), "Not equal"),
    "nobody passes a turn on": (forgets(ptx.ARRIVE), "deadlock"),
    "turns are passed on and never awaited": (forgets(ptx.MEET), "twice"),
    "another bit begins the keys that are seen": (
        text_with("bmsk.clamp.b32 $0, $1, $2", "bmsk.clamp.b32 $0, 1, $2"),
        "Not equal",
    ),
}


class Wrong(run.Emulator):
    """Makes kernels with a mistake."""

    def __init__(self, mistake, wrap=None):
        super().__init__()
        self._mistake, self._wrap = mistake, wrap

    def asm(self, op):
        return self._mistake(self, op) or super().asm(op)

    def device(self, function, **uses):
        return self._wrap(self, function) if self._wrap else function


def made_wrong(mistake, wrap=None):
    def made(config):
        tools = Wrong(mistake, wrap)
        return tools, run.made_for(tools, config)

    return made


@pytest.mark.parametrize(
    "name",
    [n if i % 4 == 0 else pytest.param(n, marks=pytest.mark.deep) for i, n in enumerate(FAULTS)],
)
def test_the_emulator_sees_mistakes(name):
    mistake, message = FAULTS[name]
    assert_found(made_wrong(mistake), message)


@pytest.mark.parametrize("name", OTHER_FAULTS)
def test_the_emulator_sees_mistakes_at_the_ends_of_tiles(name):
    mistake, message = OTHER_FAULTS[name]
    assert_found(made_wrong(mistake), message, out_dtype=np.float16)


def assert_found(made, message, out_dtype=np.float32):
    q, k, v = operands(70, 200)
    v[:, 170:] = np.nan

    def tries():
        for seed in range(4):
            emulator = {"schedule": seed, "made": made}
            assert_right((q, k, v), emulator=emulator, seqused_k=170, out_dtype=out_dtype)

    with pytest.raises((Fault, AssertionError), match=message):
        tries()


def test_the_emulator_sees_a_key_too_many():
    assert_found(made_wrong(lambda tools, op: None, one_key_more), "Not equal")


@pytest.mark.parametrize("out_dtype", [np.float16, np.float32])
def test_what_has_no_mistake_passes(out_dtype):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_found(made_wrong(lambda tools, op: None), ".", out_dtype)


def test_unknown_instructions_are_named():
    tools = run.Emulator()
    with pytest.raises(Fault, match=r"no instruction tanh\.approx\.f32"):
        compiled(Op("tanh.approx.f32 $0, $1;", "f", "f"), tools)


@pytest.mark.parametrize("op", [op for op in vars(ptx).values() if isinstance(op, Op)])
def test_all_instructions_of_the_kernels_are_known(op):
    assert callable(compiled(op, run.Emulator()))


def test_arithmetic_is_that_of_float32():
    tools = run.Emulator()
    fma, exp2, pack = (tools.asm(op) for op in (ptx.FMA, ptx.EXP2, ptx.PACK["bfloat16"]))
    x = np.float32(1 + 2.0**-12)
    assert fma(x, x, np.float32(-1 - 2.0**-11)) == np.float32(2.0**-24)  # 0 if rounded before
    assert [exp2(np.float32(x)) for x in (-np.inf, -127, 3, np.inf)] == [0, 0, 8, np.inf]
    # Ties go to even numbers; the second argument is the upper half.
    assert pack(np.float32(1 + 2.0**-8), np.float32(1 + 3 * 2.0**-8)) == 0x3F82_3F80
    assert tools.types.int32(2**31) == -(2**31)


def whole_block(kernel, memory=None):
    """Run something on a block of a warpgroup, without a kernel's launch."""
    tools = run.Emulator()
    config = SimpleNamespace(threads=128, shared=40 * 1024)
    tools.launch(kernel(tools), 1, config, memory, (), 0)
    return tools


def test_a_product_is_that_of_numpy():
    random = np.random.default_rng(3)
    a, b = (random.standard_normal((64, 64)).astype(np.float16) for _ in range(2))
    sums = {}

    def make(tools):
        products, ready = (
            tools.asm(ptx.products(64, "float16", 64, 0, 0)),
            tools.asm(ptx.wait_for(32, 0)),
        )

        def kernel():
            thread = tools.machine.current.index
            if thread == 0:
                # 128 bytes a row; of each 8 rows, row i has its chunks of 16 bytes at j ^ i.
                for at, matrix in ((2048, a), (2048 + 8192, b)):
                    for i in range(64):
                        for j in range(8):
                            bits = matrix[i, 8 * j : 8 * j + 8].view(np.uint8)
                            tools.shared.store(at + 128 * i + 16 * (j ^ i % 8), bits)
                tools.shared.fence()
            tools.cuda.syncthreads()
            mine = tools.cuda.local.array(32, np.float32)
            major = ptx.descriptor_words(16, 1024)[0]
            products(mine, 2048 >> 4 | major, 2048 + 8192 >> 4 | major)
            assert all(np.isnan(x) for x in mine)
            ready(mine)
            sums[thread] = mine

        return kernel

    whole_block(make)
    expected = a.astype(np.float32) @ b.astype(np.float32).T
    # The layout of accumulators that PTX documents for m64nNk16.
    for thread, mine in sums.items():
        row = 16 * (thread // 32) + thread % 32 // 4
        for i, x in enumerate(mine):
            place = row + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * (thread % 4) + i % 2
            assert abs(x - expected[place]) < 1e-4


def test_loads_swizzle_and_fill_with_zeros():
    array = np.arange(1, 101 * 72 + 1, dtype=np.uint16).reshape(1, 1, 101, 72)
    memory = Global()
    memory.add_map(
        512, memory.add("array", array), (72, 101, 1, 1), (144,) + (101 * 144,) * 2, (64, 16, 1, 1)
    )

    def make(tools):
        def kernel():
            if tools.machine.current.index == 0:
                tools.asm(ptx.BARRIER_INIT)(1040, 1)
                tools.asm(ptx.BARRIER_INIT_FENCE)()
                tools.asm(ptx.BARRIER_EXPECT)(1040, 2048)
                tools.asm(ptx.LOAD_TILE)(2048, 512, 1040, 64, 95, 0, 0)
                tools.asm(ptx.BARRIER_WAIT)(1040, 0)

        return kernel

    tools = whole_block(make, memory)
    got = tools.shared.halves[(2048 - SHARED_BASE) // 2 :][:1024].reshape(16, 8, 8)
    for i in range(16):
        for j in range(8):
            row, column = 95 + i, 64 + 8 * j
            expected = array[0, 0, row, column:] if row < 101 and column < 72 else np.zeros(8)
            assert (got[i, j ^ i % 8] == expected).all()
