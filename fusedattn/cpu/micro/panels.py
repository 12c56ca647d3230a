"""Products of a panel: scores of keys, and sums of weighted values."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from llvmlite import ir

from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.simd import I64, Emitter

# A chain of n additions of like terms can drift by n/4 roundings (the error of each is the same);
# the accuracy contract allows sqrt(head_dim) + 4 of them. 48 keeps every head dim inside.
CHAIN = 48


class Panels(Kernels):
    """Rows of queries across the lanes, keys or columns of values in the registers."""

    def scores(self, e: Emitter, k, k_stride, n, queries, s, head_dim) -> None:
        """``S[j][lane] = sum_d k[j][d] * queries[d][lane]`` for n keys."""
        build, size = e.builder, self.tile.real_bytes

        def group(first: ir.Value, count: int) -> None:
            tile_row = e.offset(s, first, self.row_bytes)
            chains = build.sdiv(build.add(head_dim, I64(CHAIN - 1)), I64(CHAIN))
            length = build.sdiv(build.add(head_dim, build.sub(chains, I64(1))), chains)
            with e.loop(chains) as chain:
                begin = build.mul(chain, length)
                steps = e.minimum(length, build.sub(head_dim, begin))
                key = e.offset(e.offset(k, first, k_stride), begin, size)
                rows = [e.pointer(e.offset(key, m, k_stride)) for m in range(count)]
                panel = e.offset(queries, begin, self.row_bytes)
                sums = self._register_tile(e, rows, I64(size), panel, steps)
                row = [e.pointer(e.offset(tile_row, m, self.row_bytes)) for m in range(count)]
                is_first = build.icmp_signed("==", chain, I64(0))
                with build.if_else(is_first) as (then, otherwise):
                    with then:
                        for m in range(count):
                            for v in range(self.tile.vectors):
                                self._store(e, sums[m][v], row[m], v)
                    with otherwise:
                        for m in range(count):
                            for v in range(self.tile.vectors):
                                total = build.fadd(self._load(e, row[m], v), sums[m][v])
                                self._store(e, total, row[m], v)

        many = self.tile.rows
        enough = build.icmp_signed(">=", n, I64(many))
        with build.if_else(enough) as (then, otherwise):
            with then:  # the last group overlaps its neighbour: same chains, same bits
                last = build.sub(n, I64(many))
                groups = build.sdiv(build.add(n, I64(many - 1)), I64(many))
                with e.loop(groups) as g:
                    group(e.minimum(build.mul(g, I64(many)), last), many)
            with otherwise, e.loop(n) as j:
                group(j, 1)

    def accumulate(self, e: Emitter, v, v_stride, n, s, o, columns, alpha) -> None:
        """``O[d][lane] = O[d][lane] * alpha[lane] + sum_j v[j][d] * S[j][lane]``."""
        build, size = e.builder, self.tile.real_bytes
        factor = self._vectors(e, alpha)

        def group(first: ir.Value, count: int) -> None:
            value = e.offset(v, first, size)
            rows = [e.pointer(e.offset(value, m, size)) for m in range(count)]
            sums = self._register_tile(e, rows, v_stride, s, n)
            for m in range(count):
                row = e.pointer(e.offset(o, build.add(first, I64(m)), self.row_bytes))
                for u in range(self.tile.vectors):
                    self._store(e, e.fma(self._load(e, row, u), factor[u], sums[m][u]), row, u)

        many = self.tile.rows
        groups = build.sdiv(columns, I64(many))
        with e.loop(groups) as g:
            group(build.mul(g, I64(many)), many)
        done = build.mul(groups, I64(many))
        left = build.sub(columns, done)
        for count in range(1, many):
            with build.if_then(build.icmp_signed("==", left, I64(count))):
                group(done, count)
