"""The blocked algorithm in readable NumPy: the page to read before the kernels.

Plain attention computes all of ``q k^T``, and its scores grow with the square of the length. Here
the queries are taken in blocks of `BLOCK_Q` rows, and for each of them the keys in blocks of
`BLOCK_K`, so that the only scores alive are one tile, whatever the length.

A softmax over keys that arrive block by block needs three numbers per row (Milakov & Gimelshein
2018, arXiv:1805.02867), here called the row's state:

    row_max   largest score so far
    row_sum   sum of exp(score - row_max) so far
    acc       sum of exp(score - row_max) * value so far: a vector of head_dim_v

Every exponent is at most 0, so `exp` cannot overflow. When a block brings a larger score, the sums
so far are relative to a maximum that no longer holds, and are multiplied by
``rescale = exp(old row_max - new row_max)``. In the end ``out = acc / row_sum`` and
``lse = row_max + log(row_sum)``. That is FlashAttention-2 (Dao 2023, arXiv:2307.08691, 3.1).

The state is a partial result over the keys seen so far, and taking in a block is the merge of two
partial results: that of the keys before and that of the block. `fusedattn.merge` does the same with
finished pairs ``(out, lse)``, where ``row_sum`` is 1 and ``row_max`` is lse. It is why keys may be
split between blocks, threads or machines.

The gradients are computed in the same tiles, see `fusedattn.blocked.gradients`.
"""

from typing import Any

from numpy.typing import NDArray

from fusedattn.blocked.gradients import backward
from fusedattn.blocked.output import forward
from fusedattn.blocked.tile import BLOCK_K, BLOCK_Q
from fusedattn.problem import AttentionProblem, Gradients, Result

Array = NDArray[Any]

__all__ = ["BLOCKED", "Blocked", "backward", "forward"]


class Blocked:
    """The blocked algorithm as a backend: every feature, no compiler, one thread plus BLAS."""

    name = "blocked"

    def unsupported(self, problem: AttentionProblem) -> list[str]:
        """Nothing is unsupported."""
        return []

    def describe(self, problem: AttentionProblem) -> list[str]:
        """Lines for `fusedattn.explain`."""
        return [f"NumPy, tiles of {BLOCK_Q} queries x {BLOCK_K} keys"]

    def forward(self, problem: AttentionProblem) -> Result:
        """See `forward`."""
        return forward(problem)

    def unsupported_backward(self, problem: AttentionProblem) -> list[str]:
        """Nothing is unsupported."""
        return []

    def backward(
        self,
        problem: AttentionProblem,
        d_out: Array,
        out: Array,
        lse: Array,
        d_lse: Array | None,
        *,
        bias_grad: bool,
    ) -> Gradients:
        """See `backward`."""
        return backward(problem, d_out, out, lse, d_lse, bias_grad=bias_grad)


BLOCKED = Blocked()
