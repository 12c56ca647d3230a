"""The softmax of one tile beside the scores of the next: the two units of a core work together.

The matrix unit needs 16 cycles for an instruction, in which the vector unit could do 30 of its own.
A processor looks some hundred instructions ahead, so it finds work for both only if both stand
close to each other.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from fusedattn.cpu.micro.matrix import ROW_TILES, SCORE_PAIRS, Matrix
from fusedattn.cpu.micro.parts import ROWS, filled
from fusedattn.cpu.micro.softmax import Exponent, Softmax
from fusedattn.cpu.simd import I64, Emitter
from fusedattn.cpu.tile import MATRIX_KEYS

# Pairs of keys whose weights are made beside the scores of one step.
PAIRS_OF_KEYS = ROW_TILES * ROWS // 2
# Fractions of them are counted in units of this.
UNIT_BITS = 16


class Pipeline(Matrix, Softmax):
    """Weights of a tile and scores of the next."""

    def weights_and_scores(
        self,
        e: Emitter,
        s, n, to_log2, running_max, alpha, row_sum, parts,
        k, k_part, k_stride, next_n, queries, part, head_dim,
    ) -> None:  # fmt: skip
        """What `weights`, `split_weights` and then `matrix_scores` of the next tile would do.

        The next scores take the place of those that have become weights; ``next_n`` may be 0.
        """
        build, vectors = e.builder, range(self.tile.vectors)
        maxima = self._raise_maxima(e, s, n, to_log2, running_max, alpha)
        self._fill_group(e, s, n, float("-inf"))
        total = build.ashr(filled(e, n, MATRIX_KEYS), I64(1))
        sums = [e.variable(e.splat_const(0.0)) for _ in vectors]
        done = e.variable(I64(0))
        numbers = range(self.tile.parts)
        keys = [e.offset(k, i, k_part) for i in numbers]
        panels = [e.offset(queries, i, part) for i in numbers]
        turns = len(SCORE_PAIRS[len(numbers)])
        all_turns = build.mul(build.ashr(build.add(head_dim, I64(31)), I64(5)), I64(turns))
        # Rounded up: at the end of the turns all of the pairs are behind.
        shares = build.add(I64(PAIRS_OF_KEYS << UNIT_BITS), build.sub(all_turns, I64(1)))
        per_turn = build.sdiv(shares, all_turns)

        def weigh_until(limit: ir.Value, exponent: Exponent) -> None:
            first = build.load(done)
            limit = e.minimum(limit, total)
            with e.loop(build.sub(limit, first)) as i:
                pair = build.add(first, i)
                row = e.offset(s, pair, 2 * self.row_bytes)
                rows = [e.pointer(build.add(row, I64(m * self.row_bytes))) for m in range(2)]
                loaded = [exponent(self._load(e, at, v), v) for v in vectors for at in rows]
                found = self._weights(e, loaded)
                for v in vectors:
                    pair_of_weights = found[2 * v : 2 * v + 2]
                    for weight in pair_of_weights:
                        build.store(build.fadd(build.load(sums[v]), weight), sums[v])
                    self._store_weights(e, pair_of_weights, parts, pair, v)
            build.store(limit, done)

        def next_scores(exponent: Exponent | None) -> None:
            """Make the weights of 32 keys beside their scores, if there is a way to make them."""
            with self._steps(e, next_n) as first:

                def beside(step: ir.Value) -> Callable[[int], None] | None:
                    if exponent is None:
                        return None
                    before = build.mul(step, I64(turns))

                    def weigh(turn: int) -> None:
                        share = build.mul(build.add(before, I64(turn + 1)), per_turn)
                        share = build.ashr(share, I64(UNIT_BITS))
                        weigh_until(build.add(build.ashr(first, I64(1)), share), exponent)

                    return weigh

                self._score_tiles(e, keys, k_stride, panels, first, head_dim, s, first, beside)

        with self._each_exponent(e, maxima) as (then, other, fused, rounded_first):
            with then:
                next_scores(fused)
                weigh_until(total, fused)
            with other:
                weigh_until(total, rounded_first)
                next_scores(None)
        self._add_to_sums(e, row_sum, maxima, sums)
