"""The published cases of the ONNX operator `Attention`, run through `attention` by an adapter."""

from importlib import import_module

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.backend.test.case import node as node_cases
from onnx_adapter import onnx_attention, run_node

from fusedattn.testing import assert_within

COUNTED_VERSION = "1.23"
SCORES_OUTPUT = "qk_matmul_output"


def collect():
    """Return the primary cases by name; those ending in _expanded say the same in other nodes."""
    with pytest.MonkeyPatch.context() as patch:
        # The cases of all other operators would be computed as well, in seconds, and left out.
        patch.setattr(
            node_cases, "import_recursive", lambda of: import_module(f"{of.__name__}.attention")
        )
        cases = node_cases.collect_testcases("Attention")
    return {case.name: case for case in cases if not case.name.endswith("_expanded")}


def node_of(case):
    (node,) = case.model.graph.node
    return node


CASES = collect()
WITHOUT_SCORES = {n: c for n, c in CASES.items() if SCORES_OUTPUT not in node_of(c).output}
WITH_SCORES = {n: c for n, c in CASES.items() if n not in WITHOUT_SCORES}


def of_type(half):
    """Return the names of the cases without scores whose queries are of a half type, or not."""
    return [
        name
        for name, case in WITHOUT_SCORES.items()
        if (case.data_sets[0][0][0].dtype.itemsize == 2) == half
    ]


def run(case, backend):
    """Return pairs (ours, published) of all outputs of a case."""
    ((inputs, published),) = case.data_sets
    ours = run_node(node_of(case), inputs, backend=backend)
    for got, want in zip(ours, published, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert np.isfinite(want.astype(np.float64)).all()
    return list(zip(ours, published, strict=True))


def ulp(array):
    """Return the distance from each entry to the next larger in its own type, as float64."""
    kind = ml_dtypes.finfo(array.dtype)
    size = np.maximum(np.abs(array.astype(np.float64)), float(kind.smallest_normal))
    return 2.0 ** (np.floor(np.log2(size)) - kind.nmant)


def exact(case):
    """Return Y of a case computed in float64 from the same inputs, not rounded."""
    inputs = [
        array.astype(np.float64) if array.dtype.itemsize == 2 else array
        for array in case.data_sets[0][0]
    ]
    return run_node(node_of(case), inputs, backend="reference")[0]


backends = pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])


def test_no_case_vanishes():
    if not onnx.__version__.startswith(COUNTED_VERSION + "."):
        pytest.skip(
            f"counted for onnx {COUNTED_VERSION}; onnx {onnx.__version__} has "
            f"{len(WITHOUT_SCORES)} cases that run here and {len(WITH_SCORES)} with scores"
        )
    assert (len(CASES), len(WITHOUT_SCORES), len(WITH_SCORES)) == (93, 75, 18)
    assert (len(of_type(half=False)), len(of_type(half=True))) == (65, 10)


@backends
@pytest.mark.parametrize("name", of_type(half=False))
def test_float32_cases_agree_to_their_own_tolerance(name, backend):
    case = WITHOUT_SCORES[name]
    for output, (ours, published) in enumerate(run(case, backend)):
        budget = case.atol + case.rtol * np.abs(published)
        assert_within(ours, published, budget, name=node_of(case).output[output])


@backends
@pytest.mark.parametrize("name", of_type(half=True))
def test_half_cases_agree_to_one_ulp(name, backend):
    """Within one ULP of the exact result, and of the published one or nearer the exact than it.

    The published results of half types were rounded to the half type after every step and miss the
    exact result by up to 1.7 ULP, so the nearest number of the type can lie 2 ULP from them.
    """
    case = WITHOUT_SCORES[name]
    (ours, published), *presents = run(case, backend)
    truth = exact(case)
    assert_within(ours, truth, ulp(ours))
    got, want = ours.astype(np.float64), published.astype(np.float64)
    near = np.abs(got - want) <= ulp(published)
    assert (near | (np.abs(got - truth) < np.abs(want - truth))).all()
    for ours_present, published_present in presents:
        np.testing.assert_array_equal(ours_present, published_present)


@backends
def test_the_cache_is_returned_bit_by_bit(backend):
    with_cache = [c for c in WITHOUT_SCORES.values() if "present_key" in node_of(c).output]
    assert len(with_cache) >= 1
    for case in with_cache:
        _, *presents = run(case, backend)
        assert len(presents) == 2
        for ours, published in presents:
            np.testing.assert_array_equal(ours, published)


@pytest.mark.parametrize("name", WITH_SCORES)
def test_scores_are_refused_not_invented(name):
    case = WITH_SCORES[name]
    with pytest.raises(NotImplementedError, match=r"qk_matmul_output|softmax_precision"):
        run_node(node_of(case), case.data_sets[0][0])


@pytest.mark.parametrize(
    ("inputs", "attributes", "word"),
    [
        ({}, {"softmax_precision": onnx.TensorProto.DOUBLE}, "softmax_precision 11"),
        ({}, {"dilation": 2}, "dilation"),
        ({"past_key": 0, "nonpad_kv_seqlen": 0}, {}, "two kinds of cache"),
    ],
)
def test_what_attention_cannot_say_is_refused(inputs, attributes, word):
    x = np.zeros((1, 1, 2, 4), np.float32)
    with pytest.raises(NotImplementedError, match=word):
        onnx_attention({"Q": x, "K": x, "V": x, **inputs}, attributes)


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_keys_beyond_a_shorter_mask_are_hidden(dtype):
    """The published cases with such a mask also count their keys, which hides this."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 4)).astype(np.float32)
    mask = np.ones((5, 3), dtype)
    longer = onnx_attention({"Q": q, "K": k, "V": v, "attn_mask": mask}, {})["Y"]
    cut = onnx_attention({"Q": q, "K": k[:, :, :3], "V": v[:, :, :3], "attn_mask": mask}, {})["Y"]
    np.testing.assert_array_equal(longer, cut)
