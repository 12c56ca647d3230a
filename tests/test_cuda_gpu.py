"""On an NVIDIA GPU: the laws of the kit for each kernel, and arrays in kind. ``pytest -m gpu``."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cpu_backend import assert_same_bits, normal
from cuda_promises import EXACT, HOPPER, PORTABLE
from hypothesis import settings

import fusedattn
from fusedattn import make_block_mask
from fusedattn.cuda import backend, compiler, driver
from fusedattn.testing.suite import make_suite

MISSING = compiler.missing() or list(driver.missing())
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING)),
    # What the compilers' own modules say when they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

EXAMPLES = settings().max_examples // 7


def on_gpu(q, k, v, **keywords):
    """`attention` on arrays in host memory, copied there and back."""
    return fusedattn.attention(q, k, v, backend="cuda", **keywords)


def reasons(problem):
    """Why a problem does not take the Hopper kernel once it is copied to the GPU."""
    held = {name: np.array(getattr(problem, name), order="C") for name in ("q", "k", "v")}
    return backend.not_tensor_cores(replace(problem, **held, out=None), driver.device(0))


def portable_domain(problem):
    return None if reasons(problem) else "takes the Hopper kernel"


def hopper_domain(problem):
    return "; ".join(reasons(problem)) or None


TestPortable = make_suite(
    on_gpu,
    supports=PORTABLE,
    dtypes=("float32", "float16", "bfloat16", "float64"),
    bitwise=True,
    domain=portable_domain,
    max_examples=EXAMPLES,
)

TestHopper = make_suite(
    on_gpu,
    supports=HOPPER,
    dtypes=("bfloat16", "float16"),
    bitwise=True,
    domain=hopper_domain,
    max_examples=EXAMPLES,
)


TestExact = make_suite(
    on_gpu,
    supports=EXACT,
    dtypes=("float32",),
    bitwise=True,
    domain=hopper_domain,
    max_examples=EXAMPLES,
)


@pytest.fixture(params=["torch", "cupy"])
def library(request):
    """How to bring an array to the GPU and back, with one library."""
    module = pytest.importorskip(request.param)
    if request.param == "torch":
        return (
            module.Tensor,
            lambda array: module.from_numpy(array).cuda(),
            lambda x: x.cpu().numpy(),
        )
    return module.ndarray, module.asarray, module.asnumpy


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_arrays_on_the_gpu_come_back_in_kind_with_the_same_bits(library, layout, dtype):
    kind, there, back = library
    q, k, v = (normal(seed, 2, 4, 100, 64, dtype=dtype) for seed in range(3))
    expected = on_gpu(q, k, v, causal=True, return_lse=True)
    if layout == "bshd":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    options = {"causal": True, "return_lse": True, "layout": layout}
    for _ in range(2):  # the second call finds the first one prepared
        out, lse = fusedattn.attention(there(q), there(k), there(v), **options)
        assert isinstance(out, kind)
        got = back(out).swapaxes(1, 2) if layout == "bshd" else back(out)
        assert_same_bits((got, back(lse)), expected)
    given = there(np.zeros_like(q))
    assert fusedattn.attention(there(q), there(k), there(v), out=given, **options)[0] is given
    assert_same_bits(back(given), back(out))


def test_other_backends_refuse_arrays_on_the_gpu(library):
    _, there, _ = library
    q = there(normal(0, 1, 8, 16))
    with pytest.raises(NotImplementedError, match="'cpu' takes arrays in host memory"):
        fusedattn.attention(q, q, q, backend="cpu")


def test_streams_of_torch_keep_their_order():
    torch = pytest.importorskip("torch")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        q = torch.randn(1, 8, 2048, 64, device="cuda", dtype=torch.float16)
        for _ in range(20):  # what is still under way when attention is called
            q = (q @ torch.eye(64, device="cuda", dtype=torch.float16)).contiguous()
        out = fusedattn.attention(q, q, q)
        after = out * 1
    stream.synchronize()
    assert torch.equal(after, fusedattn.attention(q, q, q))


def test_large_logits_do_not_overflow_in_their_products():
    q = normal(0, 1, 2, 70, 64, dtype=np.float16) * np.float16(2000)
    out, lse = on_gpu(q, q, q, return_lse=True)
    expected = fusedattn.attention(q, q, q, backend="reference", return_lse=True)
    np.testing.assert_allclose(out, expected[0], rtol=1e-2)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 40])
def test_tiles_with_equal_large_maxima_count_alike(rows):
    # Were a product and a difference one operation, the rounding error of a maximum of 1e34 would
    # stand for its growth, and the tiles before would weigh nothing.
    q = normal(0, 1, 2, rows, 64) * np.float32(3e16)
    k = np.repeat(normal(1, 1, 2, 1, 64), 300, axis=-2) * np.float32(3e16)
    v = normal(2, 1, 2, 300, 64)
    out, lse = on_gpu(q, k, v, return_lse=True)
    expected = np.broadcast_to(v.mean(-2, keepdims=True), out.shape)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    logits = np.einsum("bhqd,bhd->bhq", q.astype(np.float64), k[:, :, 0].astype(np.float64)) / 8
    np.testing.assert_allclose(lse, logits, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rows", [1, 40])
def test_other_lengths_take_the_launch_that_was_prepared(dtype, rows):
    torch = pytest.importorskip("torch")
    q, k, v = (normal(s, 2, 4, n, 64, dtype=dtype) for s, n in enumerate((rows, 1500, 1500)))
    there = [torch.from_numpy(x).cuda() for x in (q, k, v)]
    step = fusedattn.plan(*there, causal=True, seqused_k=1500)
    for lengths in (np.array([3, 1500]), np.array([700, 60])):
        expected = on_gpu(q, k, v, causal=True, seqused_k=lengths)
        for call in (step, partial(fusedattn.attention, causal=True)):
            assert_same_bits(call(*there, seqused_k=lengths).cpu().numpy(), expected)


def test_explain_names_the_kernel():
    q = np.zeros((1, 8, 2048, 64), np.float16)
    text = str(fusedattn.explain(q, q, q, backend="cuda"))
    hopper = driver.device(0).capability == (9, 0)
    assert ("Hopper kernel, sm_90a" if hopper else "portable kernel") in text
    whole = make_block_mask(lambda b, h, q, k: q >= k, None, None, 2048, 2048)
    text = str(fusedattn.explain(q, q, q, block_mask=whole, backend="cuda"))
    assert ("Hopper kernel, sm_90a" if hopper else "portable kernel") in text
    q = q.astype(np.float32)
    if hopper:
        text = str(fusedattn.explain(q, q, q, block_mask=whole, backend="cuda"))
        assert "block_mask is not implemented" in text
    text = str(fusedattn.explain(q, q, q, backend="cuda"))
    assert ("exact Hopper kernel, sm_90a" if hopper else "portable kernel") in text


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("rows", [1, 5])
def test_split_keys_are_combined(dtype, rows):
    q, k, v = (
        normal(i, 2, heads, n, 64, dtype=dtype)
        for i, (heads, n) in enumerate(((8, rows), (2, 1700), (2, 1700)))
    )
    options = {"causal": True, "seqused_k": np.array([1700, 300]), "return_lse": True}
    if dtype != "float16":
        options["sinks"] = normal(3, 8)
    got = on_gpu(q, k, v, **options)
    expected = fusedattn.attention(q, k, v, backend="reference", **options)
    tolerance = {"float32": 2e-6, "float16": 1e-3, "float64": 1e-13}[dtype]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
    # What is shared out changes nothing for a neighbour, nor where there is but one split to see.
    short = on_gpu(*(x[1:, :, :300] for x in (q, k, v)), **options | {"seqused_k": None})
    assert_same_bits(short, tuple(x[1:] for x in got))


def test_decodes_on_two_streams_do_not_share_their_scratch_memory():
    torch = pytest.importorskip("torch")
    streams = [torch.cuda.Stream() for _ in range(2)]
    q = [torch.randn(4, 8, 1, 64, device="cuda") for _ in streams]
    k = torch.randn(4, 8, 6000, 64, device="cuda")
    expected = [fusedattn.attention(x, k, k) for x in q]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[which].append(fusedattn.attention(q[which], k, k))
    torch.cuda.synchronize()
    for which, found in enumerate(results):
        assert all(torch.equal(one, expected[which]) for one in found)


def relative(score, batch, head, q_idx, k_idx, table, near):
    return score + table[head, k_idx - q_idx] + 0.5 * near[k_idx]


def test_a_score_mod_reads_arrays_on_the_gpu_and_in_host_memory(library):
    _, there, back = library
    q, k, v = (normal(seed, 1, 2, 70, 32) for seed in range(3))
    table, near = normal(3, 2, 200), np.arange(70) % 3
    mask = make_block_mask(
        lambda b, h, q, k, near: near[q] + k > 9, None, None, 70, 70, aux=(near,), block=(16, 8)
    )
    options = {"score_mod": relative, "block_mask": mask}
    expected = fusedattn.attention(
        q, k, v, score_mod_aux=(table, near), backend="reference", **options
    )
    arrays = tuple(map(there, (q, k, v)))
    for aux in ((table, near), (there(table), near), (there(table), there(near))):
        for factor in (1, 2):  # the second call finds the first one prepared, and other contents
            out = fusedattn.attention(*arrays, score_mod_aux=aux, **options)
            if factor == 1:
                np.testing.assert_allclose(back(out), expected, rtol=1e-5, atol=1e-5)
                first = aux[0]
                first *= 2
            else:
                assert not np.allclose(back(out), expected, rtol=1e-2, atol=1e-2)
                first *= 0.5
