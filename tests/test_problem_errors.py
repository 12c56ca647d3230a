"""The error that each bad argument gets."""

import math
import re

import ml_dtypes
import numpy as np
import pytest

from fusedattn.problem import make_problem

BFLOAT16 = ml_dtypes.bfloat16
Q, K, V = (np.zeros((2, *shape), np.float32) for shape in ((4, 5, 8), (2, 7, 8), (2, 7, 3)))


class Subclass(np.ndarray):
    """Stands for np.matrix and its like, where ``*`` is another product."""


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
