"""Which CUDA compiler is chosen, what is said where there is none, and how code is kept."""

import contextlib
import importlib.util
import types

import numpy as np
import pytest

import fusedattn
from fusedattn import (
    arrays,
    device_plan,
    dispatch,
    kernel_files,
    make_block_mask,
    make_problem,
)
from fusedattn.cuda import backend, compiler, driver, portable, tensor_cores
from fusedattn.cuda.params import compact, span_of
from fusedattn.cuda.unroll import inlined, unroll, unrolled
from fusedattn.problem import make_lengths

Q = np.zeros((1, 2, 8, 8), np.float32)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these packages are installed."""

    def pretend(*names):
        monkeypatch.delenv(compiler.VARIABLE, raising=False)
        monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: object() if name in names else None
        )

    return pretend


def test_the_maintained_compiler_comes_first(installed):
    installed("numba_cuda_mlir", "numba_cuda", "cuda", "cuda.bindings")
    assert compiler.missing() == []
    assert compiler.chosen_name() == "numba-cuda-mlir"


def test_the_other_compiler_is_the_fallback(installed):
    installed("numba_cuda", "cuda", "cuda.bindings")
    assert compiler.missing() == []
    assert compiler.chosen_name() == "numba-cuda"


def test_the_variable_overrides_the_choice(installed, monkeypatch):
    installed("numba_cuda_mlir", "numba_cuda", "cuda", "cuda.bindings")
    monkeypatch.setenv(compiler.VARIABLE, "numba-cuda")
    assert (compiler.missing(), compiler.chosen_name()) == ([], "numba-cuda")
    monkeypatch.setenv(compiler.VARIABLE, "nvcc")
    with_typo = "FUSEDATTN_CUDA_COMPILER must be one of numba-cuda-mlir, numba-cuda, simulator"
    assert compiler.missing() == [f"{with_typo}, but is 'nvcc'"]


def test_numbas_own_variable_chooses_the_simulator(installed, monkeypatch):
    installed("numba_cuda_mlir", "cuda", "cuda.bindings", "numba")
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert (compiler.missing(), compiler.chosen_name()) == ([], "simulator")


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        ((), "no CUDA compiler is installed (pip install 'fusedattn[cuda]')"),
        (
            ("numba_cuda_mlir",),
            "the package cuda-bindings is not installed (pip install 'fusedattn[cuda]')",
        ),
    ],
)
def test_explain_says_what_is_missing(installed, packages, reason):
    installed(*packages)
    answer = fusedattn.explain(Q, Q, Q, backend="cuda")
    assert answer.backend is None
    assert answer.reasons["cuda"] == [reason]
    with pytest.raises(NotImplementedError, match=r"backend 'cuda' not able"):
        fusedattn.attention(Q, Q, Q, backend="cuda")


def test_explain_says_that_there_is_no_driver_or_no_gpu(installed, monkeypatch):
    installed("numba_cuda_mlir", "cuda", "cuda.bindings")

    def no_library(flags):
        raise RuntimeError("libcuda.so.1 not found")

    def driver_that(initialises, count=0):
        return types.SimpleNamespace(
            cuInit=initialises,
            cuDeviceGetCount=lambda: (0, count),
            cuGetErrorName=lambda error: (0, b"CUDA_ERROR_NO_DEVICE"),
        )

    for fake, reason in (
        (driver_that(no_library), "no NVIDIA driver is installed (libcuda could not be loaded)"),
        (driver_that(lambda f: (100,)), "the NVIDIA driver does not start (CUDA_ERROR_NO_DEVICE)"),
        (driver_that(lambda f: (0,)), "there is no NVIDIA GPU"),
    ):
        monkeypatch.setattr(driver, "api", lambda fake=fake: fake)
        driver.missing.cache_clear()
        assert fusedattn.explain(Q, Q, Q).reasons["cuda"] == [reason]
    driver.missing.cache_clear()


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_tile_does_not_depend_on_how_many_heads_share_keys(rows, dtype):
    # Or attention over repeated heads had other bits.
    q, k = np.zeros((8, rows, 8), dtype), np.zeros((8, 30, 8), dtype)
    tiles = {portable.tile_of(make_problem(q, k[:heads], k[:heads])) for heads in (1, 2, 8)}
    assert len(tiles) == 1


def test_the_name_of_kept_code_depends_on_all_that_the_code_does(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDATTN_CACHE_DIR", str(tmp_path))
    kernel = compiler.Kernel("simt", None, ("config",), ("[float32]",), 128)
    variants = [
        (kernel, "sm_80", "numba-cuda"),
        (kernel, "sm_90a", "numba-cuda"),
        (kernel, "sm_80", "numba-cuda-mlir"),
        (kernel._replace(config=("other",)), "sm_80", "numba-cuda"),
        (kernel._replace(threads=256), "sm_80", "numba-cuda"),
    ]
    paths = {compiler.cubin_path(*variant) for variant in variants}
    monkeypatch.setattr(compiler, "_source_digest", lambda: b"another source")
    paths.add(compiler.cubin_path(*variants[0]))
    monkeypatch.setattr(compiler, "_versions", lambda name: {"numba": "another"})
    paths.add(compiler.cubin_path(*variants[0]))
    assert len(paths) == len(variants) + 2
    assert {path.parent for path in paths} == {tmp_path}


def test_damaged_code_is_compiled_again(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "chosen_name", lambda: "numba-cuda")
    monkeypatch.setattr(compiler, "entry_of", lambda cubin: "entry")
    made = []

    def build(kernel, chip):
        made.append(chip)
        return compiler.Compiled(b"machine code", "entry", "")

    monkeypatch.setattr(compiler, "build", build)
    kernel = compiler.Kernel("simt", None, (), (), 128)
    for _ in range(2):
        assert compiler.compiled(kernel, "sm_80").cubin == b"machine code"
    assert made == ["sm_80"]
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert compiler.compiled(kernel, "sm_80").cubin == b"machine code"
    assert made == ["sm_80", "sm_80"]
    assert kernel_files.read(path) == b"machine code"


def example(out, n):
    for i in unrolled(3):
        if even:  # noqa: F821
            out[2 * i] = i
        else:
            out[n] = -1


def test_loops_over_registers_are_written_out():
    from functools import partial

    space = {"even": True, "__builtins__": __builtins__}
    function = types.FunctionType(example.__code__, space, "example")
    function.__module__ = __name__
    made = unroll(function, partial(int))
    assert made.__code__.co_names == () or "unrolled" not in made.__code__.co_names
    out = {}
    made(out, 9)
    assert out == {0: 0, 2: 1, 4: 2}


def test_pieces_are_written_out_and_assign_to_what_they_are_given():
    @inlined
    def add(total, x, twice):
        """Add one number, or the same one twice."""
        i = x
        if twice:
            i = 2 * x
        total += i

    def function(n):
        i, total = 100, 0
        for j in unrolled(3):
            add(total, j + n, False)
        add(total, i, True)
        return i, total

    made = unroll(function, int)
    assert "add" not in made.__code__.co_names
    assert made(10) == (100, 10 + 11 + 12 + 200)


def test_pieces_inside_a_kernel_assign_to_what_they_say():
    def function(n):
        total, i = 0, 100

        def add(x):
            nonlocal total
            i = x + n
            total += i

        for j in unrolled(3):
            add(j)
        return i, total

    assert function(10) == unroll(function, int)(10) == (100, 33)


@pytest.mark.parametrize("even", [True, False])
def test_conditions_that_are_constants_of_the_kernel_are_decided(even):
    def function(n):
        while n > 4 if even else n > 7:
            n -= 2
        return n

    made = unroll(function, int)
    assert "even" not in made.__code__.co_names
    assert made(10) == function(10) == (4 if even else 6)


def test_a_piece_cannot_assign_to_what_is_no_variable():
    @inlined
    def clear(x):
        x = 0  # noqa: F841

    def function(n):
        clear(n + 1)

    with pytest.raises(AssertionError, match="x is assigned to, and no name"):
        unroll(function, int)


@pytest.mark.parametrize("step", [1, -1, 2])
def test_a_span_finds_every_element(step):
    base = np.arange(3 * 4 * 10, dtype=np.float32).reshape(3, 4, 10)
    array = base[:, ::step, ::-step]
    span = span_of(array)
    low = array.__array_interface__["data"][0] + span.low
    flat = np.asarray(arrays._Where(low, (span.length,), (4,), np.dtype(np.float32)))
    for index in np.ndindex(array.shape):
        place = span.offset + sum(i * s for i, s in zip(index, span.strides, strict=True))
        assert flat[place] == array[index]


def test_a_copy_holds_broadcast_axes_once():
    array = np.broadcast_to(np.arange(5.0)[:, None], (3, 5, 7))
    copy = compact(array)
    assert copy.strides == (0, 8, 0)
    np.testing.assert_array_equal(copy, array)


@pytest.mark.parametrize("lengths", [None, 5])
def test_the_hopper_kernel_copies_all_that_lies_in_host_memory(monkeypatch, lengths):
    """Arrays of a score_mod, tables of lengths, or both."""
    started = []
    function = types.SimpleNamespace(launch=lambda *arguments: started.append(arguments))
    where = types.SimpleNamespace(multiprocessors=4, function=lambda *arguments: function)
    tools = types.SimpleNamespace(array_words=lambda address, length, size: (address,))
    copied = {}

    @contextlib.contextmanager
    def copy(where, array, stream):
        copied[len(copied) + 1000] = array
        yield len(copied) + 999

    monkeypatch.setattr(driver, "copied", copy)
    monkeypatch.setattr(driver, "upload", lambda *_: types.SimpleNamespace(address=8))
    monkeypatch.setattr(tensor_cores, "encode", lambda *_: bytes(128))
    monkeypatch.setattr(compiler, "toolchain", lambda: tools)
    q, table = np.zeros((1, 1, 40, 64), np.float16), np.ones(3, np.float32)
    options = {"score_mod": lambda s, b, h, i, j, t: s + t[0], "score_mod_aux": (table,)}
    problem = fusedattn.make_problem(q, q, q, out=np.empty_like(q), **options)
    prepared = tensor_cores.Prepared(problem, where)
    in_host = {"score_mod_aux_0": table}
    if lengths is not None:
        used = make_lengths(None, None, lengths, 40, 40, ((1,), 1))
        in_host |= prepared.tables(used)
    prepared.run(dict.fromkeys(("q", "k", "v", "out"), 16), 0, in_host)
    assert len(started) == 1
    assert [id(array) for array in copied.values()] == [id(array) for array in in_host.values()]
    words = np.frombuffer(prepared._local.words._buffer, np.int64)
    assert words[5] == (8 if lengths is None else 1001)  # the items
    assert words[-1] == 1000  # the array of the score_mod


def test_without_memory_pools_the_hopper_kernel_takes_no_splits():
    few, many = np.zeros((1, 2, 1, 64), np.float16), np.zeros((1, 2, 1000, 64), np.float16)
    for pools, reasons in (
        (True, []),
        (False, ["the GPU has no memory pools for partial results"]),
    ):
        where = types.SimpleNamespace(capability=(9, 0), has_pools=pools)
        split, whole = (
            fusedattn.make_problem(few, many, many),
            fusedattn.make_problem(few, few, few),
        )
        assert backend.not_tensor_cores(split, where) == reasons
        assert backend.not_tensor_cores(whole, where) == []


def test_an_array_in_host_memory_is_not_taken_for_one_on_a_gpu():
    assert not arrays.on_gpu(Q)
    assert not arrays.on_gpu([1.0])
    on_cpu = types.SimpleNamespace(__dlpack_device__=lambda: (1, 0))
    assert not arrays.on_gpu(on_cpu)
    on_gpu = types.SimpleNamespace(__dlpack_device__=lambda: (2, 0))
    assert arrays.on_gpu(on_gpu)


def test_gradients_are_refused_with_a_reason(monkeypatch):
    monkeypatch.setenv(compiler.VARIABLE, "simulator")
    out, lse = fusedattn.attention(Q, Q, Q, return_lse=True)
    with pytest.raises(NotImplementedError, match="cuda: no gradients on a GPU yet"):
        fusedattn.attention_backward(Q, Q, Q, Q, out, lse, backend="cuda")


class Launches:
    """A backend that notes what would be started."""

    def __init__(self):
        self.prepared, self.started = 0, []
        self.where = types.SimpleNamespace(current=contextlib.nullcontext)

    def unsuitable(self, problem):
        return []

    def prepare_on(self, problem, ordinal):
        self.prepared += 1
        return self

    def run(self, addresses, stream, in_host=None):
        self.started.append((addresses, stream))
        self.in_host = in_host or {}

    def tables(self, lengths):
        return {"items": lengths}


class Lent:
    """Host memory that says it lies on a GPU."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.__cuda_array_interface__ = array.__array_interface__ | {"version": 3}


@pytest.fixture
def launches(monkeypatch):
    made = Launches()
    monkeypatch.setattr(dispatch, "choose", lambda problem, name: made)
    monkeypatch.setattr(arrays, "empty_like", lambda array, shape, dtype: Lent(np.empty(shape)))
    monkeypatch.setattr(device_plan, "_plans", {})
    return made


def test_calls_of_one_kind_on_a_gpu_are_prepared_once(launches):
    q, other = Lent(Q), Lent(Q.copy())
    for stream, x in ((7, q), (8, other)):
        fusedattn.attention(x, x, x, stream=stream)
        addresses, on = launches.started[-1]
        assert on == stream
        assert addresses["q"] == x.array.__array_interface__["data"][0]
    fusedattn.attention(q, q, q, causal=True)
    assert launches.prepared == 2


def test_a_plan_for_arrays_on_a_gpu_starts_what_was_prepared(launches):
    q, out = Lent(Q), Lent(np.empty_like(Q))
    step = fusedattn.plan(q, q, q, out=out)
    assert step(q, q, q, out=out, stream=5) is out
    (call,) = launches.started
    assert call[1] == 5
    assert launches.prepared == 1
    with pytest.raises(ValueError, match="out is not given, but when planned was an array of dt"):
        step(q, q, q)
    shorter = Lent(Q[:, :, :4])
    with pytest.raises(ValueError, match=r"k is an array of .* but when planned was"):
        step(q, shorter, shorter, out=out)


def test_a_decode_on_a_gpu_is_prepared_once_whatever_its_lengths(launches):
    q = Lent(Q)
    step = fusedattn.plan(q, q, q, seqused_k=8)
    for seqlen in (3, 4):
        fusedattn.attention(q, q, q, seqused_k=seqlen)
        assert launches.in_host["items"].seqused_k.tolist() == [seqlen]
        assert launches.in_host["items"].q_offset.tolist() == [seqlen - 8]
        step(q, q, q, seqused_k=np.array([seqlen]))
        assert launches.in_host["items"].seqused_k.tolist() == [seqlen]
    assert launches.prepared == 2  # the plan in hand, and the one that attention remembers
    with pytest.raises(ValueError, match="seqused_k must be"):
        fusedattn.attention(q, q, q, seqused_k=9)
    with pytest.raises(ValueError, match="seqused_k is not given, but when planned was given"):
        step(q, q, q)


def test_an_output_on_a_gpu_must_not_overlap_an_input(launches):
    memory = np.zeros((2, *Q.shape), Q.dtype)
    q, k, out = Lent(memory[0]), Lent(Q.copy()), Lent(memory[1])
    fusedattn.attention(q, k, k, out=out)  # the kind is known from here on
    with pytest.raises(ValueError, match=r"out must not overlap an input, .* shares memory with q"):
        fusedattn.attention(q, k, k, out=Lent(memory[0]))


FACTOR = 1.0


def scaled(score, batch, head, q_idx, k_idx, *tables):
    return score * FACTOR


def test_a_call_on_a_gpu_is_prepared_anew_for_what_its_function_computes(launches, monkeypatch):
    q = Lent(Q)

    def prepared(**options):
        before = launches.prepared
        fusedattn.attention(q, q, q, **options)
        return launches.prepared - before

    table, other = np.zeros((3, 4)), np.zeros((3, 5))
    assert prepared() == 1
    for factor in (1.0, 2.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        assert [prepared(score_mod=scaled) for _ in range(2)] == [1, 0]
        # The same code in another object computes the same.
        again = types.FunctionType(scaled.__code__, globals())
        assert prepared(score_mod=again) == 0
    small = table.astype(np.int8)
    for aux in ((table,), (other,), (other, table), (small,), (Lent(table),), (Lent(small),)):
        options = {"score_mod": scaled, "score_mod_aux": aux}
        assert [prepared(**options) for _ in range(2)] == [1, 0]
    # Whatever the strides in host memory were, the copy has none.
    assert prepared(score_mod=scaled, score_mod_aux=(np.zeros((4, 3)).T,)) == 0
    masks = [make_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8) for _ in range(2)]
    assert [prepared(block_mask=masks[i]) for i in (0, 0, 1, 0)] == [1, 0, 1, 0]
    assert prepared(block_mask=masks[0], score_mod=scaled) == 1


def test_aux_arrays_reach_a_gpu_from_there_and_from_host_memory(launches):
    q, on_gpu, table = Lent(Q), Lent(np.zeros(3)), np.arange(12.0).reshape(3, 4).T
    aux = (on_gpu, table, np.array(3, np.int8))
    step = fusedattn.plan(q, q, q, score_mod=scaled, score_mod_aux=aux)
    for call in (fusedattn.attention, step):
        keywords = {"score_mod": scaled} if call is fusedattn.attention else {}
        call(q, q, q, score_mod_aux=aux, **keywords)
        addresses, _ = launches.started[-1]
        first = on_gpu.array.__array_interface__["data"][0]
        assert addresses["score_mod_aux_0"] == first
        assert list(launches.in_host) == ["score_mod_aux_1", "score_mod_aux_2"]
        np.testing.assert_array_equal(launches.in_host["score_mod_aux_1"], table)
        assert launches.in_host["score_mod_aux_1"].flags.c_contiguous
        assert launches.in_host["score_mod_aux_2"].shape == ()
    with pytest.raises(
        ValueError, match=r"score_mod_aux is \(.*\), but when planned was \(.*in hos"
    ):
        step(q, q, q, score_mod_aux=aux[:2])
    memory = np.zeros_like(Q)
    options = {"score_mod": scaled, "out": Lent(memory)}
    near, far = (Lent(memory.ravel()[:5]),), (Lent(Q.ravel()[:5]),)
    message = r"out .* shares memory with score_mod_aux\[0\]"
    with pytest.raises(ValueError, match=message):
        fusedattn.attention(q, q, q, score_mod_aux=near, **options)
    fusedattn.attention(q, q, q, score_mod_aux=far, **options)  # the kind is known from here on
    with pytest.raises(ValueError, match=message):
        fusedattn.attention(q, q, q, score_mod_aux=near, **options)


def test_a_plan_on_a_gpu_refuses_a_function_that_has_changed(launches, monkeypatch):
    q = Lent(Q)
    step = fusedattn.plan(q, q, q, score_mod=scaled)
    step(q, q, q)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    with pytest.raises(ValueError, match="score_mod, or a number that it reads"):
        step(q, q, q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_mod": 3}, "score_mod must be a Python function"),
        ({"score_mod": scaled, "score_mod_aux": 3}, "score_mod_aux must be a tuple of arrays"),
        ({"score_mod": scaled, "score_mod_aux": (3,)}, r"score_mod_aux\[0\] must be a numpy.ndarr"),
        ({"block_mask": Q > 0}, "block_mask must be a BlockMask"),
    ],
)
def test_mistakes_in_functions_are_told_on_a_gpu_after_a_call_without_them(
    launches, options, message
):
    q = Lent(Q)
    fusedattn.attention(q, q, q)
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            fusedattn.attention(q, q, q, **options)


def test_kept_code_is_named_for_what_functions_compute(monkeypatch):
    def path(**options):
        problem = make_problem(Q, Q, Q, **options)
        config = portable.config_of(problem, portable.tile_of(problem))
        kernel = portable.kernel_of(config)
        assert hash(kernel) == hash(portable.kernel_of(config))
        return compiler.cubin_path(kernel, "sm_80", "numba-cuda-mlir")

    def masked(function):
        return path(block_mask=make_block_mask(function, None, None, 8, 8))

    one, other = np.zeros(3), np.zeros((3, 1))
    paths = [path()]
    for factor in (1.0, 2.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        again = types.FunctionType(scaled.__code__, globals())
        assert path(score_mod=scaled) == path(score_mod=again)
        paths += [path(score_mod=scaled, score_mod_aux=aux) for aux in ((), (one,), (other,))]
    paths += [masked(lambda b, h, q, k: q >= k), masked(lambda b, h, q, k: q > k)]
    assert len(set(paths)) == len(paths)
