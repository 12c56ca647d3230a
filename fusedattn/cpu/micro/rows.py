"""Products for few rows of queries, whose lanes a panel would leave empty.

Here the lanes lie along the head dim: each load of a key or value serves `ROWS_TOGETHER` rows, and
memory is read in its own order. Rows of queries and outputs are whole vectors; where the head dim
is no multiple of the width, one vector more overlaps the last, with the lanes that were counted
already set to zero.

Memory, not arithmetic, is what such a call waits for. So while keys are multiplied the rows at
``soon`` are fetched (the values of the same keys), and with the values the next keys.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from llvmlite import ir

from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.simd import I64, Emitter
from fusedattn.cpu.tile import ROWS_TOGETHER, STORAGE_BYTES


class Rows(Kernels):
    """Lanes along the head dim."""

    def _is_new(self, e: Emitter, columns: ir.Value) -> ir.Value:
        """Lanes of the overlapping last vector that no vector before it holds."""
        left = e.builder.srem(columns, I64(self.tile.width))
        first = e.splat(e.builder.sub(I64(self.tile.width), left))
        lanes = ir.Constant(ir.VectorType(I64, self.tile.width), list(range(self.tile.width)))
        return e.builder.icmp_signed(">=", lanes, first)

    def row_scores(self, e: Emitter, *arguments: ir.Value) -> None:
        """``S[j][row] = sum_d k[j][d] * queries[row][d]`` for groups of `ROWS_TOGETHER` rows."""
        self._row_scores(e, self.tile.storage, *arguments)

    def row_scores_of_reals(self, e: Emitter, *arguments: ir.Value) -> None:
        """`row_scores` for keys that are reals already."""
        self._row_scores(e, f"float{self.tile.bits}", *arguments)

    def _row_scores(
        self,
        e: Emitter,
        storage,
        k,
        k_stride,
        n,
        queries,
        q_stride,
        s,
        head_dim,
        groups,
        soon,
        soon_stride,
    ) -> None:
        build, width, size = e.builder, self.tile.width, STORAGE_BYTES[storage]
        if width < ROWS_TOGETHER:
            return  # `Tile.takes_few` says so
        full = build.sdiv(head_dim, I64(width))
        is_new = self._is_new(e, head_dim)
        has_tail = build.icmp_signed("!=", build.srem(head_dim, I64(width)), I64(0))
        together = width // ROWS_TOGETHER  # keys: as many sums as a vector has lanes
        last = e.offset(I64(0), build.sub(head_dim, I64(width)), size)

        def keys(first: ir.Value, count: int, group: ir.Value) -> None:
            sums = [e.variable(e.splat_const(0.0)) for _ in range(count * ROWS_TOGETHER)]
            key_rows = [e.offset(k, build.add(first, I64(i)), k_stride) for i in range(count)]
            row = e.offset(queries, build.mul(group, I64(ROWS_TOGETHER)), q_stride)
            query_rows = [e.offset(row, r, q_stride) for r in range(ROWS_TOGETHER)]

            def multiply(key_at: ir.Value, query_at: ir.Value, only: ir.Value | None) -> None:
                loaded = []
                for i, key_row in enumerate(key_rows):
                    soon_row = e.offset(soon, build.add(first, I64(i)), soon_stride)
                    e.prefetch(build.add(soon_row, key_at))
                    value = e.load_storage(build.add(key_row, key_at), storage, width)
                    if only is not None:
                        value = build.select(only, value, e.splat_const(0.0))
                    loaded.append(value)
                for r, query_row in enumerate(query_rows):
                    query = e.load(build.add(query_row, query_at), e.vec, self.align)
                    for i, value in enumerate(loaded):
                        place = sums[i * ROWS_TOGETHER + r]
                        build.store(e.fma(value, query, build.load(place)), place)

            with e.loop(full) as block:
                at = build.mul(block, I64(width))
                multiply(build.mul(at, I64(size)), build.mul(at, I64(e.bytes)), None)
            with build.if_then(has_tail):
                multiply(last, build.mul(full, I64(self.vector_bytes)), is_new)
            totals = [build.load(place) for place in sums]
            padding = [e.splat_const(0.0)] * (width - len(totals))
            total = e.sum_of_each(totals + padding)
            for i in range(count):
                lanes = list(range(i * ROWS_TOGETHER, (i + 1) * ROWS_TOGETHER))
                at = e.offset(s, build.add(first, I64(i)), self.row_bytes)
                at = e.offset(at, group, ROWS_TOGETHER * e.bytes)
                e.store(e.shuffle(total, total, lanes), at)

        with e.loop(groups) as group:
            blocks = build.sdiv(n, I64(together))
            with e.loop(blocks) as block:
                keys(build.mul(block, I64(together)), together, group)
            done = build.mul(blocks, I64(together))
            with e.loop(build.sub(n, done)) as i:
                keys(build.add(done, i), 1, group)

    def row_accumulate(self, e: Emitter, *arguments: ir.Value) -> None:
        """``O[row] = O[row] * alpha[row] + sum_j S[j][row] * v[j]`` for groups of rows."""
        self._row_accumulate(e, self.tile.storage, *arguments)

    def row_accumulate_of_reals(self, e: Emitter, *arguments: ir.Value) -> None:
        """`row_accumulate` for values that are reals already."""
        self._row_accumulate(e, f"float{self.tile.bits}", *arguments)

    def _row_accumulate(
        self,
        e: Emitter,
        storage,
        v,
        v_stride,
        n,
        s,
        o,
        o_stride,
        columns,
        alpha,
        groups,
        soon,
        soon_stride,
    ) -> None:
        build, width, size = e.builder, self.tile.width, STORAGE_BYTES[storage]
        full = build.sdiv(columns, I64(width))
        has_tail = build.icmp_signed("!=", build.srem(columns, I64(width)), I64(0))
        last = e.offset(I64(0), build.sub(columns, I64(width)), size)
        many = 4 if self.tile.rows == 8 else 2  # vectors of columns in registers at once

        def vectors(group: ir.Value, value_at: ir.Value, out_at: ir.Value, count: int) -> None:
            sums = [e.variable(e.splat_const(0.0)) for _ in range(ROWS_TOGETHER * count)]
            weight_at = e.offset(s, group, ROWS_TOGETHER * e.bytes)
            with e.loop(n) as j:
                at = build.add(e.offset(v, j, v_stride), value_at)
                soon_row = build.add(e.offset(soon, j, soon_stride), value_at)
                for line in range(0, count * width * size, 64):
                    e.prefetch(build.add(soon_row, I64(line)))
                weights = e.offset(weight_at, j, self.row_bytes)
                values = [
                    e.load_storage(build.add(at, I64(i * width * size)), storage, width)
                    for i in range(count)
                ]
                for r in range(ROWS_TOGETHER):
                    weight = e.splat(e.load(build.add(weights, I64(r * e.bytes)), e.real))
                    for i, value in enumerate(values):
                        place = sums[r * count + i]
                        build.store(e.fma(value, weight, build.load(place)), place)
            for r in range(ROWS_TOGETHER):
                row = build.add(build.mul(group, I64(ROWS_TOGETHER)), I64(r))
                factor = e.splat(e.load(e.offset(alpha, row, e.bytes), e.real))
                out = build.add(e.offset(o, row, o_stride), out_at)
                for i in range(count):
                    place = build.add(out, I64(i * self.vector_bytes))
                    old = e.load(place, e.vec, self.align)
                    e.store(e.fma(old, factor, build.load(sums[r * count + i])), place, self.align)

        with e.loop(groups) as group:
            blocks = build.sdiv(full, I64(many))
            with e.loop(blocks) as block:
                first = build.mul(block, I64(many * width))
                vectors(group, build.mul(first, I64(size)), build.mul(first, I64(e.bytes)), many)
            done = build.mul(blocks, I64(many))
            with e.loop(build.sub(full, done)) as i:
                first = build.mul(build.add(done, i), I64(width))
                vectors(group, build.mul(first, I64(size)), build.mul(first, I64(e.bytes)), 1)
            with build.if_then(has_tail):  # its first lanes repeat the vector before: same sums
                vectors(group, last, build.mul(full, I64(self.vector_bytes)), 1)
