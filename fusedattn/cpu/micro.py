"""One tile's arithmetic: the micro-kernels, written as vector IR and called from the macro loops.

A panel of queries lies across the lanes, so a tile of scores is stored transposed, as
``S[key][lane]``: no operation of the softmax is horizontal, keys and value columns enter by
broadcast from the caller's own rows, and nothing but the queries is ever packed. There is no
mask logic here beyond "select minus infinity", no allocation and no loop over tiles.

Arithmetic that decides bits:

* every score is one chain of FMAs over at most ``CHAIN`` head dims, chains added in order;
* every output column of a block is one chain of FMAs over the block's keys, begun at zero, and
  joins the running output by one FMA. A hidden key is ``fma(v, 0, acc) = acc``, so a tile that is
  skipped, computed in part or computed in full gives the same bits;
* the running maximum is an integer in log2 units, so every rescaling is an exact power of two.

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867); block order,
FlashAttention-2 (arXiv:2307.08691), algorithm 1; register tiles, Goto & van de Geijn 2008.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fusedattn.cpu.simd import DOUBLE, I1, I8, I32, I64, Emitter, define
from fusedattn.cpu.tile import ROWS_TOGETHER, STORAGE_BYTES, Tile
from fusedattn.philox import KEY_STEPS, MULTIPLIERS, ROUNDS

# A chain of n additions of like terms can drift by n/4 roundings (the error of each is the same);
# the accuracy contract allows sqrt(head_dim) + 4 of them. 48 keeps every head dim inside.
CHAIN = 48

# The maximum before any key was seen. Finite, so that no lane ever computes inf - inf; below every
# score of the promised domain (at most max/4, times log2(e)).
UNSEEN = {32: -3.0e38, 64: -1.6e308}

# 2**f on [-1/2, 1/2], minimax, constant first: errors 2.0e-9 and 3.2e-18.
EXP2 = {
    32: (
        1.0,
        0.6931472067028326,
        0.24022650922288757,
        0.05550327226670302,
        0.009618056678524637,
        0.0013400428177615838,
        0.0001546144469856913,
    ),
    64: (
        1.0,
        0.6931471805599453,
        0.24022650695910158,
        0.055504108664821625,
        0.009618129107587256,
        0.001333355814640647,
        0.00015403530463724353,
        1.5252733841556773e-05,
        1.3215432535912375e-06,
        1.0178057087733941e-07,
        7.074194297288521e-09,
        4.4558179083360645e-10,
    ),
}
# (2**f - 1) / f on [-1/2, 1/2], minimax: errors 1.7e-10 and 1.7e-19.
EXP2M1 = {
    32: (
        0.6931471805599453,
        0.24022650922288757,
        0.055504108839096185,
        0.009618056678524637,
        0.001333350238616277,
        0.0001546144469856913,
        1.5297323760701075e-05,
    ),
    64: (
        0.6931471805599453,
        0.24022650695910072,
        0.055504108664821625,
        0.00961812910762848,
        0.001333355814640647,
        0.00015403530393370734,
        1.5252733841556773e-05,
        1.3215486808705563e-06,
        1.0178057087733941e-07,
        7.0548973041554995e-09,
        4.4558179083360645e-10,
        2.5729324177362305e-11,
    ),
}
LOG2_E = 1.4426950408889634
EXPONENT_BITS = {32: 127, 64: 1023}
MANTISSA_BITS = {32: 23, 64: 52}


# Arguments of each micro-kernel, see `define` and the methods of `_Writer` for their names. Every
# address points to rows of ``tile.lanes`` elements on a cache line, or to the caller's own memory.
# They come in groups, each a module that is compiled when a call first needs it.
GROUPS = {
    "common": {
        "weights": "iifiii>",
        "hide_outside": "iiiii>",
        "unpack": "iiiiii>",
        "stage": "iiiiiiii>",
        "dot": "iiiii>f",
    },
    "panels": {
        "scores": "iiiiii>",
        "accumulate": "iiiiiii>",
        "pack": "iiiif>",
    },
    "rows": {
        "row_scores": "iiiiiiiiii>",
        "row_scores_of_reals": "iiiiiiiiii>",
        "row_accumulate": "iiiiiiiiiii>",
        "row_accumulate_of_reals": "iiiiiiiiiii>",
        "gather": "iiiif>",
    },
    "passes": {
        "multiply": "iif>",
        "softcap": "iif>",
        "alibi": "iiiii>",
        "bias_tile": "iiiiii>",
        "add": "iii>",
    },
    "mask": {
        "mask_tile": "iiiiii>i",
        "hide_masked": "iii>",
        "copy": "iiiiiiii>",
    },
    "dropout": {"drop": "iiiiiiii>"},
}
SIGNATURES = {name: letters for group in GROUPS.values() for name, letters in group.items()}


def emit_module(tile: Tile, group: str) -> ir.Module:
    """Return the module with one group of micro-kernels for a tile shape."""
    module, writer = ir.Module(name=f"fusedattn_{group}"), _Writer(tile)
    for name, signature in GROUPS[group].items():
        define(module, name, signature, getattr(writer, name), tile.bits, tile.width)
    return module


class _Writer:
    """Emits the body of each micro-kernel for one tile shape."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.row_bytes = tile.lanes * tile.real_bytes
        self.vector_bytes = tile.width * tile.real_bytes
        self.align = min(64, self.vector_bytes)

    # --- helpers -------------------------------------------------------------------------------

    def _load(self, e: Emitter, row: ir.Value, vector: int) -> ir.Value:
        return e.load_at(row, vector * self.vector_bytes, e.vec, self.align)

    def _store(self, e: Emitter, value: ir.Value, row: ir.Value, vector: int) -> None:
        e.store_at(value, row, vector * self.vector_bytes, self.align)

    def _each(self, e: Emitter, s: ir.Value, n: ir.Value, change: Any) -> None:
        """Replace every vector of ``n`` rows by ``change(vector index, row index, value)``."""
        with e.loop(n) as j:
            row = e.pointer(e.offset(s, j, self.row_bytes))
            for v in range(self.tile.vectors):
                self._store(e, change(v, j, self._load(e, row, v)), row, v)

    def _vectors(self, e: Emitter, address: ir.Value, kind: ir.Type | None = None) -> list[ir.Value]:
        """Load one row of lanes as vectors of ``kind`` (default: of reals)."""
        kind = kind or e.vec
        size = self.tile.width * (4 if kind == e.i32vec else self.tile.real_bytes)
        return [
            e.load(e.offset(address, v, size), kind, min(size, 16))
            for v in range(self.tile.vectors)
        ]

    def _polynomial(self, e: Emitter, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
        value = e.splat_const(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            value = e.fma(value, x, e.splat_const(coefficient))
        return value

    def _split_exponent(self, e: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return ``(2**n, x - n)`` for the integer n nearest to x, -EXPONENT_BITS <= n <= 0 or so.

        Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits; the exponent bias is
        in the constant already, so one shift makes the power. The power multiplies (it is not added
        to the exponent field), because a NaN must stay one whatever its payload.
        """
        mantissa, bias = MANTISSA_BITS[e.bits], EXPONENT_BITS[e.bits]
        magic = e.splat_const(1.5 * 2.0**mantissa + bias)
        build = e.builder
        shifted = build.fadd(x, magic)
        fraction = build.fsub(x, build.fsub(shifted, magic))
        power = build.shl(build.bitcast(shifted, e.ivec), e.splat_int(mantissa))
        return build.bitcast(power, e.vec), fraction

    def _register_tile(
        self, e: Emitter, rows: list[ir.Value], step: ir.Value, b: ir.Value, n: ir.Value
    ) -> list[list[ir.Value]]:
        """``sum_k a[m][k] * b[k][lane]`` for a handful of rows m: one FMA chain per accumulator.

        ``rows`` are byte pointers to a[m][0]; ``step`` is the distance of a[m][k] and a[m][k+1].
        """
        build, vectors = e.builder, self.tile.vectors
        sums = [[e.variable(e.splat_const(0.0)) for _ in range(vectors)] for _ in rows]
        panel = e.pointer(b)

        def multiply(k: ir.Value) -> None:
            at = build.mul(k, I64(self.row_bytes))
            panel_row = [
                e.load_at(panel, build.add(at, I64(v * self.vector_bytes)), e.vec, self.align)
                for v in range(vectors)
            ]
            for m, row in enumerate(rows):
                scalar = e.splat(e.load_at(row, build.mul(k, step), e.real, 1))
                for v in range(vectors):
                    build.store(e.fma(scalar, panel_row[v], build.load(sums[m][v])), sums[m][v])

        # Two steps a turn: the loop's own instructions compete with the FMAs for their ports.
        pairs = build.ashr(n, I64(1))
        with e.loop(pairs) as pair:
            k = build.shl(pair, I64(1))
            multiply(k)
            multiply(build.add(k, I64(1)))
        with build.if_then(build.trunc(n, I1)):
            multiply(build.shl(pairs, I64(1)))
        return [[build.load(place) for place in row] for row in sums]

    # --- products ------------------------------------------------------------------------------

    def scores(self, e: Emitter, k, k_stride, n, queries, s, head_dim) -> None:  # type: ignore[no-untyped-def]
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

    def accumulate(self, e: Emitter, v, v_stride, n, s, o, columns, alpha) -> None:  # type: ignore[no-untyped-def]
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

    # --- products for few rows -----------------------------------------------------------------
    #
    # With a row or two the lanes above would stand empty. Here they lie along the head dim: each
    # load of a key or value serves `ROWS_TOGETHER` rows, and memory is read in its own order.
    # Rows of queries and outputs are whole vectors; where the head dim is no multiple of the width,
    # one vector more overlaps the last, with the lanes that were counted already set to zero.
    #
    # Memory, not arithmetic, is what such a call waits for. So while keys are multiplied the rows
    # at ``soon`` are fetched (the values of the same keys), and with the values the next keys.

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

    def _row_scores(self, e: Emitter, storage, k, k_stride, n, queries, q_stride, s, head_dim, groups, soon, soon_stride) -> None:  # type: ignore[no-untyped-def] # noqa: E501
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

    def _row_accumulate(self, e: Emitter, storage, v, v_stride, n, s, o, o_stride, columns, alpha, groups, soon, soon_stride) -> None:  # type: ignore[no-untyped-def] # noqa: E501
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

    # --- the softmax pass ----------------------------------------------------------------------

    def weights(self, e: Emitter, s, n, to_log2, running_max, alpha, row_sum) -> None:  # type: ignore[no-untyped-def]
        """Scores to unnormalised weights ``2**(to_log2 * s - max)``; updates the running state.

        ``alpha`` becomes the power of two by which what was accumulated before must be rescaled.
        """
        build, vectors = e.builder, range(self.tile.vectors)
        factor = e.splat(e.to_real(to_log2))
        lowest = e.splat_const(UNSEEN[e.bits])
        floor = e.splat_const(-float(EXPONENT_BITS[e.bits]))

        # Two maxima in turn: one chain would wait for its own latency.
        largest = [[e.variable(lowest) for _ in vectors] for _ in range(2)]

        def maximise(j: ir.Value, turn: int) -> None:
            row = e.pointer(e.offset(s, j, self.row_bytes))
            for v in vectors:
                value = e.larger(self._load(e, row, v), build.load(largest[turn][v]))
                build.store(value, largest[turn][v])

        pairs = build.ashr(n, I64(1))
        with e.loop(pairs) as pair:
            maximise(build.shl(pair, I64(1)), 0)
            maximise(build.add(build.shl(pair, I64(1)), I64(1)), 1)
        with build.if_then(build.trunc(n, I1)):
            maximise(build.shl(pairs, I64(1)), 0)

        old = self._vectors(e, running_max)
        shift, rescale = [], []
        any_large = e.variable(ir.Constant(ir.IntType(self.tile.width), 0))
        for v in vectors:
            row_max = e.larger(build.load(largest[0][v]), build.load(largest[1][v]))
            new = e.larger(e.ceil(build.fmul(row_max, factor)), old[v])
            shift.append(new)
            power, _ = self._split_exponent(e, e.larger(build.fsub(old[v], new), floor))
            rescale.append(power)
            e.store(new, e.offset(running_max, v, self.vector_bytes), 16)
            e.store(power, e.offset(alpha, v, self.vector_bytes), 16)
            bits = build.bitcast(self._is_large(e, new), ir.IntType(self.tile.width))
            build.store(build.or_(build.load(any_large), bits), any_large)

        sums = [e.variable(e.splat_const(0.0)) for _ in vectors]

        def to_weights(exponent: Any) -> None:
            with e.loop(n) as j:
                row = e.pointer(e.offset(s, j, self.row_bytes))
                for v in vectors:
                    x = e.at_least(exponent(self._load(e, row, v), v), floor)
                    power, fraction = self._split_exponent(e, x)
                    weight = build.fmul(self._polynomial(e, fraction, EXP2[e.bits]), power)
                    self._store(e, weight, row, v)
                    build.store(build.fadd(build.load(sums[v]), weight), sums[v])

        def fused(score: ir.Value, v: int) -> ir.Value:
            return e.fma(score, factor, build.fneg(shift[v]))

        def rounded_first(score: ir.Value, v: int) -> ir.Value:
            # A large maximum is itself a rounded product: the exponent must see the same rounding
            # or it can come out far above zero. Lane by lane: neighbours must not move a bit.
            product = build.fsub(build.fmul(score, factor), shift[v])
            return build.select(self._is_large(e, shift[v]), product, fused(score, v))

        none = ir.Constant(ir.IntType(self.tile.width), 0)
        with build.if_else(build.icmp_unsigned("==", build.load(any_large), none)) as (then, other):
            with then:
                to_weights(fused)
            with other:
                to_weights(rounded_first)
        before = self._vectors(e, row_sum)
        for v in vectors:
            total = e.fma(before[v], rescale[v], build.load(sums[v]))
            e.store(total, e.offset(row_sum, v, self.vector_bytes), 16)

    def _is_large(self, e: Emitter, x: ir.Value) -> ir.Value:
        limit = e.splat_const(2.0 ** (MANTISSA_BITS[e.bits] - 1))
        return e.builder.fcmp_ordered(">=", e.absolute(x), limit)

    # --- passes over a tile of scores ----------------------------------------------------------

    def hide_outside(self, e: Emitter, s, n, first_key, low, high) -> None:  # type: ignore[no-untyped-def]
        """Minus infinity where not ``low[lane] <= first_key + j < high[lane]``."""
        build = e.builder
        lows, highs = self._vectors(e, low, e.i32vec), self._vectors(e, high, e.i32vec)
        widths = [build.sub(b, a) for a, b in zip(lows, highs, strict=True)]

        def hide(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            key = e.splat(build.trunc(build.add(first_key, j), I32))
            seen = build.icmp_unsigned("<", build.sub(key, lows[v]), widths[v])
            return build.select(seen, value, e.splat_const(float("-inf")))

        self._each(e, s, n, hide)

    def hide_masked(self, e: Emitter, s, n, mask) -> None:  # type: ignore[no-untyped-def]
        """Minus infinity where the byte ``mask[j][lane]`` is 0."""
        build, byte_vec = e.builder, ir.VectorType(I8, self.tile.width)

        def hide(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            at = e.offset(mask, j, self.tile.lanes)
            seen = e.load(build.add(at, I64(v * self.tile.width)), byte_vec)
            kept = build.icmp_unsigned("!=", seen, e.splat_int(0, byte_vec))
            return build.select(kept, value, e.splat_const(float("-inf")))

        self._each(e, s, n, hide)

    def multiply(self, e: Emitter, s, n, factor) -> None:  # type: ignore[no-untyped-def]
        """``S * factor``."""
        by = e.splat(e.to_real(factor))
        self._each(e, s, n, lambda _v, _j, value: e.builder.fmul(value, by))

    def add(self, e: Emitter, s, n, bias) -> None:  # type: ignore[no-untyped-def]
        """``S[j][lane] + bias[j][lane]``; a bias of minus infinity hides whatever the score is."""
        build, hidden = e.builder, e.splat_const(float("-inf"))

        def change(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            added = self._load(e, e.pointer(e.offset(bias, j, self.row_bytes)), v)
            hides = build.fcmp_ordered("==", added, hidden)
            return build.select(hides, hidden, build.fadd(value, added))

        self._each(e, s, n, change)

    def alibi(self, e: Emitter, s, n, first_key, position, slope) -> None:  # type: ignore[no-untyped-def]
        """``S - slope[lane] * |position[lane] - key|``, the distance exact."""
        build = e.builder
        places = self._vectors(e, position, e.i32vec)
        slopes = [build.fneg(x) for x in self._vectors(e, slope)]

        def change(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            key = e.splat(build.trunc(build.add(first_key, j), I32))
            distance = build.sitofp(build.sub(places[v], key), e.vec)
            return e.fma(slopes[v], e.absolute(distance), value)

        self._each(e, s, n, change)

    def softcap(self, e: Emitter, s, n, cap) -> None:  # type: ignore[no-untyped-def]
        """``cap * tanh(S / cap)``, tanh(a) = (exp(2a) - 1) / (exp(2a) + 1) with expm1's accuracy."""
        build = e.builder
        limit = e.splat(e.to_real(cap))
        saturated = e.splat_const(10.0 if e.bits == 32 else 20.0)  # tanh rounds to 1 from here on

        def change(_v: int, _j: ir.Value, value: ir.Value) -> ir.Value:
            x = build.fdiv(value, limit)
            size = e.absolute(x)
            size = build.select(build.fcmp_ordered("<", saturated, size), saturated, size)
            exponent = build.fmul(size, e.splat_const(2.0 * LOG2_E))
            power, fraction = self._split_exponent(e, exponent)
            small = build.fmul(self._polynomial(e, fraction, EXP2M1[e.bits]), fraction)
            grown = e.fma(power, small, build.fsub(power, e.splat_const(1.0)))
            tanh = build.fdiv(grown, build.fadd(grown, e.splat_const(2.0)))
            negative = build.fcmp_ordered("<", x, e.splat_const(0.0))
            return build.fmul(limit, build.select(negative, build.fneg(tanh), tanh))

        self._each(e, s, n, change)

    def drop(self, e: Emitter, s, n, first_key, threshold, seed, rows, heads, batch) -> None:  # type: ignore[no-untyped-def]
        """Zero the weights that dropout drops: Philox4x32-10 word ``key % 4`` below the threshold.

        Counter words (key // 4, row, head, batch), key words the seed, low word first.
        The formula of `fusedattn.philox`, a vector of rows at a time.
        """
        build = e.builder
        bound = e.splat(build.trunc(threshold, I32))
        row_words, head_words = (self._vectors(e, table, e.i32vec) for table in (rows, heads))
        batch_word = e.splat(build.trunc(batch, I32))
        end = build.add(first_key, n)
        first_group = build.ashr(first_key, I64(2))
        groups = build.sub(build.ashr(build.add(end, I64(3)), I64(2)), first_group)
        with e.loop(groups) as g:
            group = build.add(first_group, g)
            for v in range(self.tile.vectors):
                counter = [e.splat(build.trunc(group, I32)), row_words[v], head_words[v], batch_word]
                for word, random in enumerate(self._philox(e, counter, seed)):
                    key = build.add(build.shl(group, I64(2)), I64(word))
                    inside = build.and_(
                        build.icmp_signed(">=", key, first_key), build.icmp_signed("<", key, end)
                    )
                    with build.if_then(inside):
                        at = e.offset(s, build.sub(key, first_key), self.row_bytes)
                        row = e.pointer(at)
                        kept = build.icmp_unsigned(">=", random, bound)
                        weight = self._load(e, row, v)
                        kept_weight = build.select(kept, weight, e.splat_const(0.0))
                        self._store(e, kept_weight, row, v)

    def _philox(self, e: Emitter, counter: list[ir.Value], seed: ir.Value) -> list[ir.Value]:
        build, wide = e.builder, ir.VectorType(I64, self.tile.width)
        keys = [build.trunc(seed, I32), build.trunc(build.lshr(seed, I64(32)), I32)]

        def product(factor: int, word: ir.Value) -> tuple[ir.Value, ir.Value]:
            full = build.mul(build.zext(word, wide), ir.Constant(wide, [factor] * self.tile.width))
            high = build.lshr(full, ir.Constant(wide, [32] * self.tile.width))
            return build.trunc(high, e.i32vec), build.trunc(full, e.i32vec)

        for _ in range(ROUNDS):
            high_0, low_0 = product(MULTIPLIERS[0], counter[0])
            high_1, low_1 = product(MULTIPLIERS[1], counter[2])
            counter = [
                build.xor(build.xor(high_1, counter[1]), e.splat(keys[0])),
                low_1,
                build.xor(build.xor(high_0, counter[3]), e.splat(keys[1])),
                low_0,
            ]
            keys = [build.add(key, I32(step)) for key, step in zip(keys, KEY_STEPS, strict=True)]
        return counter

    # --- tiles of the dense mask and of the bias -----------------------------------------------

    def _transposed(self, e: Emitter, table, offset, step, n, dense, block, single) -> None:  # type: ignore[no-untyped-def]
        """Walk ``n`` keys of the rows in ``table`` from a byte offset on.

        ``block(first key, index of the vector, addresses)`` handles ``width`` keys of ``width`` lanes that lie
        densely, ``single(key, lane, address)`` one element.
        """
        build, width = e.builder, self.tile.width
        blocks = build.select(dense, build.sdiv(n, I64(width)), I64(0))
        with e.loop(blocks) as b, e.loop(self.tile.vectors) as v:
            first, lanes = build.mul(b, I64(width)), e.offset(table, v, 8 * width)
            at = build.add(offset, build.mul(first, step))
            rows = [e.load(e.offset(lanes, i, 8), I64, 8) for i in range(width)]
            block(first, v, [build.add(row, at) for row in rows])
        done = build.mul(blocks, I64(width))
        with e.loop(build.sub(n, done)) as i, e.loop(self.tile.lanes) as lane:
            key = build.add(done, i)
            row = e.load(e.offset(table, lane, 8), I64, 8)
            single(key, lane, build.add(row, build.add(offset, build.mul(key, step))))

    def mask_tile(self, e: Emitter, target, table, offset, step, n, seen) -> ir.Value:  # type: ignore[no-untyped-def]
        """Bytes of the mask as ``target[key][lane]``; ``seen[key]``: whether some lane sees it.

        Returns 0 if no entry is true and 2 if all are, else 1; plus 4 if each key is seen.
        """
        build, width, lanes = e.builder, self.tile.width, self.tile.lanes
        byte_vec = ir.VectorType(I8, width)

        def block(first: ir.Value, v: ir.Value, addresses: list[ir.Value]) -> None:
            place = e.offset(e.offset(target, first, lanes), v, width)
            for i, keys in enumerate(e.transpose([e.load(a, byte_vec) for a in addresses])):
                e.store(keys, build.add(place, I64(i * lanes)))

        def single(key: ir.Value, lane: ir.Value, address: ir.Value) -> None:
            e.store(e.load(address, I8), build.add(e.offset(target, key, lanes), lane))

        dense = build.icmp_signed("==", step, I64(1))
        self._transposed(e, table, offset, step, n, dense, block, single)

        none, every = e.splat_int(0, byte_vec), ir.Constant(ir.IntType(width), -1)
        any_bits, all_bits = (e.variable(x) for x in (ir.Constant(every.type, 0), every))
        keys_seen = e.variable(I64(0))
        with e.loop(n) as j:
            key_bits = ir.Constant(every.type, 0)
            for v in range(self.tile.vectors):
                values = e.load(build.add(e.offset(target, j, lanes), I64(v * width)), byte_vec)
                bits = build.bitcast(build.icmp_unsigned("!=", values, none), every.type)
                key_bits = build.or_(key_bits, bits)
                build.store(build.and_(build.load(all_bits), bits), all_bits)
            build.store(build.or_(build.load(any_bits), key_bits), any_bits)
            is_seen = build.icmp_unsigned("!=", key_bits, ir.Constant(every.type, 0))
            e.store(build.zext(is_seen, I8), build.add(seen, j))
            build.store(build.add(build.load(keys_seen), build.zext(is_seen, I64)), keys_seen)
        some = build.icmp_unsigned("!=", build.load(any_bits), ir.Constant(every.type, 0))
        full = build.icmp_unsigned("==", build.load(all_bits), every)
        complete = build.icmp_signed("==", build.load(keys_seen), n)
        kind = build.select(full, I64(2), build.zext(some, I64))
        return build.add(kind, build.select(complete, I64(4), I64(0)))

    def bias_tile(self, e: Emitter, target, table, offset, step, n, storage) -> None:  # type: ignore[no-untyped-def]
        """A tile of the bias as ``target[key][lane]`` in the accumulator type."""
        build, width, size = e.builder, self.tile.width, self.tile.real_bytes
        for code, (name, stored) in enumerate(STORAGE_BYTES.items()):

            def block(
                first: ir.Value, v: ir.Value, addresses: list[ir.Value], name: str = name
            ) -> None:
                place = e.offset(e.offset(target, first, self.row_bytes), v, self.vector_bytes)
                rows = [e.load_storage(address, name, width) for address in addresses]
                for i, keys in enumerate(e.transpose(rows)):
                    e.store(keys, build.add(place, I64(i * self.row_bytes)), self.align)

            def single(
                key: ir.Value, lane: ir.Value, address: ir.Value, name: str = name
            ) -> None:
                place = e.offset(e.offset(target, key, self.row_bytes), lane, size)
                e.store(e.load_storage(address, name), place)

            # A bias mostly comes in the type of its scores, or of the queries: those go by blocks.
            common = name in (self.tile.storage, f"float{self.tile.bits}")
            dense = build.icmp_signed("==", step, I64(stored if common else -1))
            with build.if_then(build.icmp_signed("==", storage, I64(code))):
                walk = block if common else lambda *_: None
                self._transposed(e, table, offset, step, n, dense, walk, single)

    # --- moving rows in and out ----------------------------------------------------------------

    def _blocks(self, e: Emitter, columns: ir.Value, step: ir.Value, storage: str) -> ir.Value:
        """How many blocks of ``width`` neighbours a row has: none when its stride is not dense."""
        dense = e.builder.icmp_signed("==", step, I64(STORAGE_BYTES[storage]))
        blocks = e.builder.sdiv(columns, I64(self.tile.width))
        return e.builder.select(dense, blocks, I64(0))

    def pack(self, e: Emitter, queries, table, step, head_dim, sign) -> None:  # type: ignore[no-untyped-def]
        """``queries[d][lane] = sign * row[lane][d]``; ``table`` holds the address of each row."""
        self._pack(e, self.tile.storage, queries, table, step, head_dim, sign)

    def gather(self, e: Emitter, target, table, step, columns, sign) -> None:  # type: ignore[no-untyped-def]
        """`pack` for rows that are reals."""
        self._pack(e, f"float{self.tile.bits}", target, table, step, columns, sign)

    def _pack(self, e: Emitter, storage, queries, table, step, head_dim, sign) -> None:  # type: ignore[no-untyped-def]
        build, width = e.builder, self.tile.width
        factor = e.to_real(sign)
        blocks = self._blocks(e, head_dim, step, storage)
        with e.loop(blocks) as block, e.loop(self.tile.vectors) as v:
            first = build.mul(block, I64(width))
            at, lanes = build.mul(first, step), e.offset(table, v, 8 * width)
            rows = []
            for lane in range(width):
                address = e.load(e.offset(lanes, lane, 8), I64, 8)
                rows.append(e.load_storage(build.add(address, at), storage, width))
            target = e.offset(e.offset(queries, first, self.row_bytes), v, self.vector_bytes)
            for i, column in enumerate(e.transpose(rows)):
                place = build.add(target, I64(i * self.row_bytes))
                e.store(build.fmul(column, e.splat(factor)), place, self.align)
        done = build.mul(blocks, I64(width))
        with e.loop(build.sub(head_dim, done)) as i, e.loop(self.tile.lanes) as lane:
            d = build.add(done, i)
            address = e.load(e.offset(table, lane, 8), I64, 8)
            value = e.load_storage(e.offset(address, d, step), storage)
            place = e.offset(e.offset(queries, d, self.row_bytes), lane, self.tile.real_bytes)
            e.store(build.fmul(value, factor), place)

    def unpack(self, e: Emitter, o, factor, table, step, columns, check) -> None:  # type: ignore[no-untyped-def]
        """``row[lane][d] = o[d][lane] * factor[lane]``, rounded to the type of out.

        ``check[lane]`` becomes 0 if every element of the row is finite and NaN otherwise. Adding
        +0 turns -0 into +0: whether a hidden tile was skipped must not show in a sign of zero.
        """
        build, width, storage = e.builder, self.tile.width, self.tile.out_storage
        zero = e.splat_const(0.0)
        blocks = self._blocks(e, columns, step, storage)
        done = build.mul(blocks, I64(width))
        with e.loop(self.tile.vectors) as v:
            at = build.mul(v, I64(self.vector_bytes))
            factors = e.load(build.add(factor, at), e.vec, self.align)
            seen = e.variable(zero)
            lanes = e.offset(table, v, 8 * width)
            addresses = [e.load(e.offset(lanes, lane, 8), I64, 8) for lane in range(width)]

            def finished(d: ir.Value) -> ir.Value:
                row = build.add(e.offset(o, d, self.row_bytes), at)
                value = e.fma(e.load(row, e.vec, self.align), factors, zero)
                build.store(e.fma(value, zero, build.load(seen)), seen)
                return value

            with e.loop(blocks) as block:
                first = build.mul(block, I64(width))
                values = [finished(build.add(first, I64(i))) for i in range(width)]
                for address, row in zip(addresses, e.transpose(values), strict=True):
                    e.store_storage(row, e.offset(address, first, step), storage)
            with e.loop(build.sub(columns, done)) as i:
                d = build.add(done, i)
                value = finished(d)
                for lane, address in enumerate(addresses):
                    element = build.extract_element(value, I32(lane))
                    e.store_storage(element, e.offset(address, d, step), storage)
            e.store(build.load(seen), build.add(check, at), self.align)

    def stage(self, e: Emitter, target, target_stride, source, stride, step, n, columns, keep) -> None:  # type: ignore[no-untyped-def]
        """Copy n rows as reals; rows whose byte ``keep[j]`` is 0 become 0 (``keep`` 0: copy all)."""
        rows = (target, target_stride, source, stride, step, n, columns, keep)
        self._copy(e, self.tile.storage, *rows)

    def copy(self, e: Emitter, *rows: ir.Value) -> None:
        """`stage` for rows that are reals already."""
        self._copy(e, f"float{self.tile.bits}", *rows)

    def _copy(self, e: Emitter, storage, target, target_stride, source, stride, step, n, columns, keep) -> None:  # type: ignore[no-untyped-def] # noqa: E501
        build, width = e.builder, self.tile.width
        blocks = self._blocks(e, columns, step, storage)
        with e.loop(n) as j:
            to, of = e.offset(target, j, target_stride), e.offset(source, j, stride)
            kept = e.variable(I8(1))
            with build.if_then(build.icmp_signed("!=", keep, I64(0))):
                build.store(e.load(build.add(keep, j), I8), kept)
            is_kept = build.icmp_unsigned("!=", build.load(kept), I8(0))
            with e.loop(blocks) as block:
                d = build.mul(block, I64(width))
                value = e.load_storage(e.offset(of, d, step), storage, width)
                value = build.select(is_kept, value, e.splat_const(0.0))
                e.store(value, e.offset(to, d, self.tile.real_bytes))
            done = build.mul(blocks, I64(width))
            with e.loop(build.sub(columns, done)) as i:
                d = build.add(done, i)
                value = e.load_storage(e.offset(of, d, step), storage)
                value = build.select(is_kept, value, ir.Constant(e.real, 0.0))
                e.store(value, e.offset(to, d, self.tile.real_bytes))

    def dot(self, e: Emitter, left, left_step, right, right_step, n) -> ir.Value:  # type: ignore[no-untyped-def]
        """A dot product in float64, four chains wide: for rows that need the exact path."""
        build, storage = e.builder, self.tile.storage
        exact = Emitter(build, 64, 1)
        sums = [e.variable(ir.Constant(DOUBLE, 0.0)) for _ in range(4)]

        def multiply(d: ir.Value, chain: int) -> None:
            x = exact.load_storage(e.offset(left, d, left_step), storage)
            y = exact.load_storage(e.offset(right, d, right_step), storage)
            build.store(exact.fma(x, y, build.load(sums[chain])), sums[chain])

        quarter = build.ashr(n, I64(2))
        with e.loop(quarter) as block:
            for chain in range(4):
                multiply(build.add(build.shl(block, I64(2)), I64(chain)), chain)
        done = build.shl(quarter, I64(2))
        with e.loop(build.sub(n, done)) as i:
            multiply(build.add(done, i), 0)
        low, high = (build.fadd(build.load(sums[i]), build.load(sums[i + 2])) for i in (0, 1))
        return build.fadd(low, high)
