"""What a call resolves to."""

import math

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


def test_an_out_interleaved_with_an_input_is_allowed():
    both = np.zeros((2, 4, 5, 6), np.float32)
    problem = make_problem(Q, Q, both[..., 3:], out=both[..., :3])
    assert np.shares_memory(problem.out, both)


def test_an_out_in_any_order_of_memory_is_allowed():
    out = np.empty((3, 5, 4, 2), np.float32).T[:, ::-1]
    assert make_problem(Q, K, V, out=out).out.strides == out.strides
