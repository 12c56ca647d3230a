"""What a problem resolves to, and the error that each bad argument gets."""

import math
import re

import ml_dtypes
import numpy as np
import pytest

from fusedattn.problem import make_problem

BFLOAT16 = ml_dtypes.bfloat16


def operands(dtype=np.float32, heads=4, heads_kv=2, dim_v=3):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, heads, 5, 8)).astype(dtype)
    k = rng.standard_normal((2, heads_kv, 7, 8)).astype(dtype)
    v = rng.standard_normal((2, heads_kv, 7, dim_v)).astype(dtype)
    return q, k, v


Q, K, V = operands()


class Subclass(np.ndarray):
    """Stands for np.matrix and its like, where ``*`` is another product."""


@pytest.mark.parametrize(
    ("dtype", "accumulator"),
    [
        (np.float16, np.float32),
        (BFLOAT16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
    ],
)
def test_half_types_accumulate_in_float32(dtype, accumulator):
    problem = make_problem(*operands(dtype))
    assert problem.dtype == problem.out_dtype == dtype
    assert problem.accumulator == accumulator


def test_defaults_are_resolved():
    problem = make_problem(Q, K, V)
    assert problem.scale == 1 / math.sqrt(8)
    assert problem.q_offset.tolist() == [2, 2]
    assert problem.seqused_q.tolist() == [5, 5]
    assert problem.seqused_k.tolist() == [7, 7]
    assert (problem.batch_shape, problem.batch_size) == ((2,), 2)
    assert (problem.num_heads, problem.num_heads_kv, problem.group_size) == (4, 2, 2)
    assert (problem.seqlen_q, problem.seqlen_k) == (5, 7)
    assert (problem.head_dim, problem.head_dim_v) == (8, 3)
    assert problem.out_shape == (2, 4, 5, 3)
    assert problem.lse_shape == (2, 4, 5)
    assert problem.window_size == (None, None)


def test_default_offset_follows_the_lengths_in_use():
    problem = make_problem(Q, K, V, seqused_q=np.array([5, 1]), seqused_k=np.array([[7]])[0])
    assert problem.q_offset.tolist() == [2, 6]


def test_per_item_integers_broadcast_in_c_order():
    q = np.zeros((2, 3, 1, 4, 8), np.float32)
    problem = make_problem(q, q, q, seqused_k=np.array([[1], [2]]), q_offset=np.arange(3))
    assert problem.seqused_k.tolist() == [1, 1, 1, 2, 2, 2]
    assert problem.q_offset.tolist() == [0, 1, 2, 0, 1, 2]


def test_arrays_are_views_never_copies():
    mask, bias = np.ones((5, 7), bool), np.zeros((4, 1, 1))
    problem = make_problem(Q, K, V, mask=mask, bias=bias)
    for view, array in (
        (problem.q, Q),
        (problem.k, K),
        (problem.v, V),
        (problem.mask, mask),
        (problem.bias, bias),
    ):
        assert np.shares_memory(view, array)
    assert problem.mask.shape == problem.bias.shape == (2, 4, 5, 7)
    assert problem.mask.strides == (0, 0, 7, 1)
    assert problem.bias_shape == (4, 1, 1)


def test_per_item_integers_are_copies():
    lengths = np.array([1, 2])
    problem = make_problem(Q, K, V, seqused_k=lengths)
    lengths[:] = 0
    assert problem.seqused_k.tolist() == [1, 2]


def test_bshd_is_a_view_and_restore_undoes_it():
    swapped = [array.swapaxes(1, 2) for array in (Q, K, V)]
    problem = make_problem(*swapped, layout="bshd")
    assert problem.q.shape == Q.shape
    assert np.shares_memory(problem.q, Q)
    assert problem.restore(problem.q).shape == swapped[0].shape
    assert make_problem(Q, K, V).restore(Q) is Q


def test_out_is_viewed_in_canonical_order():
    out = np.empty((2, 5, 4, 3), np.float32)
    swapped = [array.swapaxes(1, 2) for array in (Q, K, V)]
    problem = make_problem(*swapped, layout="bshd", out=out)
    assert problem.out.shape == problem.out_shape
    assert np.shares_memory(problem.out, out)


def test_a_memmap_is_a_plain_array(tmp_path):
    mapped = np.memmap(tmp_path / "q", np.float32, "w+", shape=Q.shape)
    assert type(make_problem(mapped, K, V).q) is np.ndarray


def test_numpy_scalars_are_numbers():
    problem = make_problem(
        Q,
        K,
        V,
        scale=np.float32(0.5),
        softcap=np.int64(2),
        causal=np.True_,
        window_size=[np.int32(1), None],
        q_offset=np.int8(-3),
        seqused_q=np.uint8(1),
    )
    assert (problem.scale, problem.softcap, problem.causal) == (0.5, 2.0, True)
    assert problem.window_size == (1, None)
    assert (problem.q_offset[0], problem.seqused_q[0]) == (-3, 1)


@pytest.mark.parametrize("scale", [0, -1.5, 1e-300, 3e38])
def test_any_scale_that_is_finite_in_the_accumulator_is_allowed(scale):
    assert make_problem(Q, K, V, scale=scale).scale == scale


def test_a_seed_without_dropout_is_ignored():
    assert make_problem(Q, K, V, seed=2**64 - 1).dropout_p == 0.0


@pytest.mark.parametrize(
    "shape", [(0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8), (0, 0, 0, 1), (3, 0, 2, 4, 5, 8)]
)
def test_any_axis_but_head_dim_may_be_zero(shape):
    empty = np.zeros(shape, np.float32)
    problem = make_problem(empty, empty, empty, mask=np.ones(1, bool), bias=np.zeros(()))
    assert problem.out_shape == shape
    assert problem.batch_size == math.prod(shape[:-3])
    assert problem.flops == 0


def test_no_heads_may_stand_over_no_kv_heads():
    q, k = np.zeros((0, 5, 8), np.float32), np.zeros((4, 5, 8), np.float32)
    assert make_problem(q, q, q).group_size == 1
    assert make_problem(q, k, k).group_size == 0


def test_flops_count_the_visible_pairs():
    x = np.zeros((3, 2, 8, 16), np.float32)
    assert make_problem(x, x, x).flops == 4 * 3 * 2 * 8 * 8 * 16
    assert make_problem(x, x, x, causal=True).flops == 4 * 3 * 2 * (8 * 9 // 2) * 16
    one = make_problem(x, x, x, seqused_k=np.array([0, 0, 1]))
    assert one.flops == 4 * 2 * 8 * 1 * 16


def test_bytes_count_broadcast_axes_once():
    x = np.zeros((3, 2, 8, 16), np.float32)
    plain = make_problem(x, x, x)
    assert plain.bytes_moved == 4 * x.nbytes
    with_mask = make_problem(x, x, x, mask=np.ones((8, 1), bool), return_lse=True)
    assert with_mask.bytes_moved == 4 * x.nbytes + 8 + 3 * 2 * 8 * 4


def test_a_problem_is_frozen():
    with pytest.raises(AttributeError):
        make_problem(Q, K, V).scale = 1.0


# Each bad call: the keywords (or q, k, v), the error, and what its message must say: the name, what
# it is, what was expected.
BAD = {
    "list": (dict(q=[[[1.0]]]), TypeError, "q must be a numpy.ndarray, but is of type.*list"),
    "subclass": (
        dict(q=Q.view(Subclass)),
        TypeError,
        "q must be a numpy.ndarray, but is of type.*Subclass",
    ),
    "masked array": (dict(v=np.ma.masked_array(V)), TypeError, "v must be a numpy.ndarray"),
    "None": (dict(k=None), TypeError, "k must be a numpy.ndarray, but is None"),
    "object": (
        dict(k=K.astype(object)),
        TypeError,
        "k must have dtype float16, bfloat16, float32 or float64, but .*object",
    ),
    "complex": (dict(q=Q.astype(complex)), TypeError, r"q must have dtype .*complex128 .*2, 4, 5"),
    "int": (dict(v=V.astype(int)), TypeError, "v must have dtype .*int64"),
    "longdouble": (dict(v=V.astype(np.longdouble)), TypeError, "v must have dtype"),
    "byte order": (
        dict(q=Q.astype(">f4")),
        TypeError,
        r"q must be in the machine's byte order, but has dtype '>f4'.*astype\('float32'\)",
    ),
    "mixed": (
        dict(k=K.astype(np.float64)),
        TypeError,
        "k must have q's dtype float32, but has dtype float64",
    ),
    "rank 2": (
        dict(q=Q[0, 0]),
        ValueError,
        r"q must have at least 3 axes, \(..., heads, seqlen, dim\), but has shape \(5, 8\)",
    ),
    "ranks": (dict(k=K[0]), ValueError, r"k must have 4 axes as q.*but has shape \(2, 7, 8\)"),
    "batch": (
        dict(k=K[:1]),
        ValueError,
        r"leading axes of q, k and v must be equal.*q \(2, 4, 5, 8\), k \(1, 2, 7, 8\)",
    ),
    "batch v": (dict(v=V[:1]), ValueError, "leading axes"),
    "lengths": (
        dict(v=V[:, :, 1:]),
        ValueError,
        r"v must have the length of k \(7\), but has length 6.*v \(2, 2, 6, 3\)",
    ),
    "kv heads": (dict(v=V[:, :1]), ValueError, r"v must have as many heads as k \(2\), but has 1"),
    "heads": (
        dict(q=Q[:, :3]),
        ValueError,
        r"heads of q must be a multiple of k's \(2\), but are 3",
    ),
    "no kv heads": (dict(k=K[:, :0], v=V[:, :0]), ValueError, "k must have at least one head"),
    "head_dim": (dict(q=Q[..., :7]), ValueError, r"k must have the head_dim of q \(7\), but has 8"),
    "head_dim 0": (
        dict(q=Q[..., :0], k=K[..., :0]),
        ValueError,
        "head_dim and head_dim_v must be at least 1, but are 0 and 3",
    ),
    "head_dim_v 0": (dict(v=V[..., :0]), ValueError, "must be at least 1, but are 8 and 0"),
    "seqlen": (
        dict(q=np.broadcast_to(np.float32(0), (2, 2, 2**30 + 1, 8))),
        ValueError,
        r"seqlen must be at most 2\*\*30, but is 1073741825 for q",
    ),
    "layout": (dict(layout="sbhd"), ValueError, "layout must be 'bhsd' or 'bshd', but is 'sbhd'"),
    "layout type": (dict(layout=None), ValueError, "layout must be .*None"),
    "scale nan": (dict(scale=math.nan), ValueError, "scale must be a finite number, but is nan"),
    "scale inf": (dict(scale=10**400), ValueError, "scale must be a finite number, but is inf"),
    "scale large": (dict(scale=1e39), ValueError, "scale must be finite in float32.*but is 1e.39"),
    "scale type": (dict(scale="1"), TypeError, "scale must be a real number, but is '1'"),
    "scale bool": (dict(scale=True), TypeError, "scale must be a real number, but is True"),
    "scale array": (
        dict(scale=np.ones(1)),
        TypeError,
        "scale must be a real number, but",
    ),
    "causal": (dict(causal=1), TypeError, "causal must be True or False, but is 1"),
    "return_lse": (dict(return_lse=None), TypeError, "return_lse must be True or False"),
    "window int": (
        dict(window_size=128),
        TypeError,
        r"window_size must be a pair \(left, right\).*but is 128",
    ),
    "window triple": (dict(window_size=(1, 2, 3)), TypeError, r"pair.*but is \(1, 2, 3\)"),
    "window text": (dict(window_size="ab"), TypeError, "pair .*but is 'ab'"),
    "window float": (
        dict(window_size=(1.0, None)),
        TypeError,
        r"window_size\[0\] must be None \(open\) or an int >= 0, but is 1.0",
    ),
    "window bool": (dict(window_size=(None, True)), TypeError, r"window_size\[1\] .*but is True"),
    "window -1": (
        dict(window_size=(-1, -1)),
        ValueError,
        r"window_size\[0\] must be .*, but is -1; a side without a limit is None",
    ),
    "window right": (dict(window_size=(0, -2)), ValueError, r"window_size\[1\] must be .*-2"),
    "offset float": (dict(q_offset=1.0), TypeError, "q_offset must be an int or an array of int"),
    "offset bool": (dict(q_offset=True), TypeError, "q_offset must be an int .*but is True"),
    "offset range": (
        dict(q_offset=2**30),
        ValueError,
        "q_offset must be in the range -1073741823 to 1073741823, but is 1073741824",
    ),
    "used range": (
        dict(seqused_k=8),
        ValueError,
        "seqused_k must be in the range 0 to 7, but is 8",
    ),
    "used array": (
        dict(seqused_q=np.array([-1, 5])),
        ValueError,
        "seqused_q must be in the range 0 to 5, but holds values from -1 to 5",
    ),
    "used uint": (
        dict(seqused_q=np.array([2**64 - 1], np.uint64)),
        ValueError,
        "seqused_q must be in the range 0 to 5, but holds values from 18446744073709551615",
    ),
    "used shape": (
        dict(seqused_q=np.array([1, 2, 3])),
        ValueError,
        r"seqused_q must broadcast to the leading axes = \(2,\), but has shape \(3,\)",
    ),
    "used dtype": (
        dict(seqused_q=np.array([1.0, 2.0])),
        TypeError,
        "seqused_q must have an integer dtype .*float64|<f8",
    ),
    "used list": (dict(seqused_q=[1, 2]), TypeError, "seqused_q must be an int or an array"),
    "mask float": (
        dict(mask=np.zeros((5, 7), np.float32)),
        TypeError,
        "mask must have dtype bool .*float32 and shape .*additive masks go into bias",
    ),
    "mask list": (dict(mask=[[True]]), TypeError, "mask must be a numpy.ndarray"),
    "mask shape": (
        dict(mask=np.ones((5, 6), bool)),
        ValueError,
        r"mask must broadcast to \(..., heads, seqlen_q, seqlen_k\) = \(2, 4, 5, 7\), but has "
        r"shape \(5, 6\)",
    ),
    "mask rank": (dict(mask=np.ones((1, 2, 4, 5, 7), bool)), ValueError, "mask must broadcast"),
    "bias bool": (dict(bias=np.ones((5, 7), bool)), TypeError, "bias must have dtype .*bool"),
    "bias shape": (dict(bias=np.ones((2, 5, 7))), ValueError, "bias must broadcast to"),
    "slopes shape": (
        dict(alibi_slopes=np.ones(3)),
        ValueError,
        r"alibi_slopes must have shape \(heads,\) or .*with 4 heads, but has shape \(3,\)",
    ),
    "slopes scalar": (dict(alibi_slopes=np.ones(())), ValueError, "alibi_slopes must have shape"),
    "slopes batch": (dict(alibi_slopes=np.ones((3, 4))), ValueError, "alibi_slopes must broadcast"),
    "slopes float": (dict(alibi_slopes=0.5), TypeError, "alibi_slopes must be a numpy.ndarray"),
    "sinks shape": (
        dict(sinks=np.ones((2, 4))),
        ValueError,
        r"sinks must have shape \(heads,\) = \(4,\), but has \(2, 4\)",
    ),
    "sinks int": (dict(sinks=np.ones(4, int)), TypeError, "sinks must have dtype"),
    "softcap 0": (
        dict(softcap=0),
        ValueError,
        r"softcap must be None \(off\) or a number > 0 .*but is 0",
    ),
    "softcap negative": (dict(softcap=-1.0), ValueError, "softcap must be .*but is -1"),
    "softcap inf": (dict(softcap=math.inf), ValueError, "softcap must be a finite number"),
    "softcap tiny": (dict(softcap=1e-60), ValueError, "softcap must be .*> 0 in float32.*1e-60"),
    "dropout 1": (
        dict(dropout_p=1.0, seed=1),
        ValueError,
        r"dropout_p must be in the range \[0, 1\), but is 1.0",
    ),
    "dropout negative": (dict(dropout_p=-0.1, seed=1), ValueError, "dropout_p must be .*-0.1"),
    "dropout None": (dict(dropout_p=None), TypeError, "dropout_p must be a real number"),
    "no seed": (
        dict(dropout_p=0.5),
        ValueError,
        r"seed must be an int in the range \[0, 2\*\*64\) when dropout_p > 0, but is None",
    ),
    "seed range": (
        dict(dropout_p=0.5, seed=2**64),
        ValueError,
        "seed must be in the range 0 to 18446744073709551615, but is 18446744073709551616",
    ),
    "seed negative": (dict(seed=-1), ValueError, "seed must be in the range 0"),
    "seed float": (dict(seed=1.0), TypeError, "seed must be an int, but is 1.0"),
    "out_dtype": (
        dict(out_dtype=np.float64),
        TypeError,
        r"out_dtype must be None, q's dtype \(float32\) or float32, but is '<f8' \(float64\)",
    ),
    "out_dtype int": (dict(out_dtype=int), TypeError, "out_dtype must be .*int64"),
    "out_dtype order": (dict(out_dtype=">f4"), TypeError, "out_dtype must be .*'>f4'"),
    "out_dtype junk": (dict(out_dtype="junk"), TypeError, "out_dtype must be a dtype, but is 'ju"),
    "out type": (dict(out=[0.0]), TypeError, "out must be a numpy.ndarray"),
    "out shape": (
        dict(out=np.empty((2, 4, 5, 8), np.float32)),
        ValueError,
        r"out must have shape \(2, 4, 5, 3\), but has shape \(2, 4, 5, 8\)",
    ),
    "out dtype": (
        dict(out=np.empty((2, 4, 5, 3))),
        TypeError,
        r"out must have dtype float32 \(q's, or out_dtype where given\), but .*'<f8'",
    ),
    "out broadcast": (
        dict(
            out=np.lib.stride_tricks.as_strided(
                np.empty(15, np.float32), (2, 4, 5, 3), (0, 0, 12, 4)
            )
        ),
        ValueError,
        r"out must have a place of its own for each element.*strides \(0, 0, 12, 4\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_described_and_corrected(case):
    given, error, message = BAD[case]
    arguments = {"q": Q, "k": K, "v": V} | given
    with pytest.raises(error) as caught:
        make_problem(**arguments)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_messages_speak_of_the_layout_of_the_caller():
    swapped = [array.swapaxes(1, 2) for array in (Q, K, V)]
    with pytest.raises(ValueError, match=r"seqlen, heads, dim\): q \(2, 5, 4, 8\)"):
        make_problem(swapped[0], swapped[1], swapped[2][:, 1:], layout="bshd")


def test_a_readonly_out_is_refused():
    out = np.empty((2, 4, 5, 3), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out must be writeable, but is a read-only array"):
        make_problem(Q, K, V, out=out)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks", "mask"])
def test_an_out_that_overlaps_an_input_is_refused(name):
    memory = np.zeros(10_000, np.uint8)
    out = memory[:480].view(np.float32).reshape(2, 4, 5, 3)
    shapes = {"q": Q.shape, "k": K.shape, "v": V.shape, "bias": (5, 7), "sinks": (4,)}
    if name == "mask":
        overlapping = memory[400:435].view(bool).reshape(5, 7)
    else:
        shape = shapes[name]
        overlapping = memory[476 : 476 + 4 * math.prod(shape)].view(np.float32).reshape(shape)
    arguments = {"q": Q, "k": K, "v": V} | {name: overlapping}
    expected = rf"out must not overlap an input, .* shares memory with {name} "
    with pytest.raises(ValueError, match=expected):
        make_problem(**arguments, out=out)


def test_an_out_interleaved_with_an_input_is_allowed():
    both = np.zeros((2, 4, 5, 6), np.float32)
    problem = make_problem(Q, Q, both[..., 3:], out=both[..., :3])
    assert np.shares_memory(problem.out, both)


def test_an_out_in_any_order_of_memory_is_allowed():
    out = np.empty((3, 5, 4, 2), np.float32).T[:, ::-1]
    assert make_problem(Q, K, V, out=out).out.strides == out.strides
