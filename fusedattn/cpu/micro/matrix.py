"""Products of a panel by the matrix unit (Intel AMX), for all types but float64.

One instruction adds to a tile of 16 x 16 float32 the product of 16 x 32 and 32 x 16 bfloat16. The
products are exact. Each element takes two chains of 16 FMAs, for the even and the odd terms, which
begin at zero and are added together and then to the tile: fewer roundings in a row than the chain
of `Panels`. What is multiplied comes in exact parts, see `Parts`: the three parts of two float32
numbers meet in six products. A rest is multiplied apart, and what it adds where it is zero is zero:
whether a neighbour has a rest moves no bit of a row. Where an infinity would turn that zero into
NaN, the score stays what it was.

A float32 weight, times ``LIFT``, is three parts of 8 digits, by truncation.

The matrix unit takes results below 2**-126 for zeros. ``LIFT`` keeps what that loses below the
roundings of a subnormal float32: in a column of a block at most 2**10 additions lose less than
2**-126 / LIFT = 2**-156 each, where 128 FMAs lose up to 2**-150 each. A score loses less than
2**-126 by each of its additions: see `fusedattn.cpu.lowering` for the scales that would show it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llvmlite import ir
from numba.core import cgutils

from fusedattn.cpu.interface import LIFT
from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.micro.parts import LINE, ROWS, filled
from fusedattn.cpu.simd import BYTES, I8, I64, Emitter
from fusedattn.cpu.tile import MATRIX_KEYS

# Rests move a score by less than 2**20 (2**-126 times numbers below 2**128, and few of them), which
# is less than half a unit of a score from here on; an infinite one must stay what it is.
MOST_WITH_REST = 2.0**64


# Two tiles of rows meet the one or two tiles of lanes of a panel at a time: the sums and what is
# multiplied just fit the 8 tiles that there are.
ROW_TILES = 2

# Which parts of two numbers are multiplied, of the left and the right one, by the number of parts:
# of keys and queries, and of values and the three parts of weights. Mostly from the smallest
# product to the largest, and in an order in which one of both often stays loaded.
_OF_THREE = ((0, 2), (1, 1), (1, 0), (2, 0), (0, 1), (0, 0))
SCORE_PAIRS = {1: ((0, 0),), 2: ((1, 0), (1, 1), (0, 1), (0, 0)), 3: _OF_THREE}
VALUE_PAIRS = {
    1: ((0, 0), (0, 1), (0, 2)),
    2: ((0, 2), (1, 1), (1, 0), (0, 1), (0, 0)),
    3: _OF_THREE,
}

# The layout of all tiles, as 64-bit words: palette 1; 64 bytes a row for each of the 8; 16 rows.
CONFIGURATION = (1, 0, *(2 * (0x0040_0040_0040_0040,)), 0, 0, 0x1010_1010_1010_1010, 0)


class Matrix(Kernels):
    """Scores and sums of weighted values, two tiles of rows at a time."""

    def configure(self, e: Emitter) -> None:
        """Give the tiles of this thread their shape."""
        words = cgutils.alloca_once(e.builder, ir.ArrayType(I64, len(CONFIGURATION)))
        e.builder.store(ir.Constant(words.type.pointee, CONFIGURATION), words)
        self._instruct(e, "ldtilecfg", e.builder.bitcast(words, BYTES))

    def release(self, e: Emitter) -> None:
        """Clear the tiles, so that the system need not keep them."""
        self._instruct(e, "tilerelease")

    def matrix_scores(self, e: Emitter, k, k_part, k_stride, n, queries, part, s, head_dim) -> None:
        """``S[j][lane] = sum_d k[j][d] * queries[d][lane]`` without the rests, for whole tiles.

        ``k_part`` and ``part`` bytes lie between the parts of keys and queries.
        """
        self._scores(e, k, k_part, k_stride, n, queries, part, s, head_dim)

    def _scores(
        self, e: Emitter, k, k_part, k_stride, n, queries, part, s, head_dim, beside=None
    ) -> None:
        """`matrix_scores`, with ``beside(first key)(step)(turn)`` beside the products, if given."""
        parts = range(self.tile.parts)
        keys, panels = (
            [e.offset(x, i, step) for i in parts] for x, step in ((k, k_part), (queries, part))
        )
        with self._steps(e, n) as first:
            work = beside and beside(first)
            self._score_tiles(e, keys, k_stride, panels, first, head_dim, s, work)
        self._store_last(e, s, n)

    def add_rest_scores(self, e: Emitter, k, k_stride, n, queries, s, head_dim, product) -> None:
        """Add the scores of rests and numbers."""
        if self.tile.parts > 1:
            return  # no element has a rest
        build, count = e.builder, ROW_TILES * ROWS
        limit = e.splat_const(MOST_WITH_REST)
        with self._steps(e, n) as first:
            self._score_tiles(e, [k], k_stride, [queries], first, head_dim)
            self._store_tiles(e, product)

            def add(v: int, j: ir.Value, score: ir.Value) -> ir.Value:
                rest = self._load(e, e.pointer(e.offset(product, j, self.row_bytes)), v)
                total = e.fma(rest, e.splat_const(1.0 / LIFT), score)
                small = build.fcmp_ordered("<", e.absolute(score), limit)
                return build.select(small, total, score)

            self._each(e, e.offset(s, first, self.row_bytes), I64(count), add)

    def split_weights(self, e: Emitter, s, n, parts) -> None:
        """Parts of ``LIFT * weight``, for whole groups of keys; see `_store_weights`.

        What is missing in the last group of 32 keys becomes 0.
        """
        build = e.builder
        self._fill_group(e, s, n, 0.0)
        self._stay_awake(e)
        with e.loop(build.ashr(filled(e, n, MATRIX_KEYS), I64(1))) as pair:
            row = e.offset(s, pair, 2 * self.row_bytes)
            rows = [e.pointer(build.add(row, I64(i * self.row_bytes))) for i in range(2)]
            for v in range(self.tile.vectors):
                lifted = [build.fmul(self._load(e, at, v), e.splat_const(LIFT)) for at in rows]
                self._store_weights(e, lifted, parts, pair, v)

    def _fill_group(self, e: Emitter, s, n, value: float) -> None:
        """Fill up the last group of 32 keys of a tile."""
        with e.loop(e.builder.sub(filled(e, n, MATRIX_KEYS), n)) as i:
            row = e.pointer(e.offset(s, e.builder.add(n, i), self.row_bytes))
            for v in range(self.tile.vectors):
                self._store(e, e.splat_const(value), row, v)

    def _store_weights(self, e: Emitter, pair_of_weights, parts, pair, v: int) -> None:
        """Three parts of lifted weights of two keys, as ``[key // 2][lane][key % 2]``.

        Rows of the first two parts come in turns; those of the third follow after a whole tile.
        """
        build = e.builder
        mask, half = e.splat_int(-0x10000, e.i32vec), e.splat_int(16, e.i32vec)
        row = e.offset(parts, pair, 2 * self.row_bytes)
        third = e.offset(build.add(parts, I64(self.third_part)), pair, self.row_bytes)
        left = pair_of_weights
        for target in (row, build.add(row, I64(self.row_bytes)), third):
            raw = [build.bitcast(x, e.i32vec) for x in left]
            # The last part is all that is left: its lower half is empty.
            digits = raw if target is third else [build.and_(x, mask) for x in raw]
            both = build.or_(build.lshr(raw[0], half), digits[1])
            e.store_at(both, e.pointer(target), v * LINE, LINE)
            left = [
                build.fsub(x, build.bitcast(d, e.vec)) for x, d in zip(left, digits, strict=True)
            ]

    @property
    def third_part(self) -> int:
        """Where the third parts of weights begin."""
        return self.tile.block_k * self.row_bytes

    def matrix_accumulate(
        self, e: Emitter, values, v_part, v_stride, n, weights, o, columns, alpha, product
    ) -> None:
        """``O[d][lane] = O[d][lane] * alpha[lane] + sum_j v[j][d] * weight[j][lane]``.

        Without the rests of values; ``v_part`` bytes lie between their parts. The output is lifted
        as the weights are, and as values of float32 are: see `unlift`.
        """
        of_values = (values, v_part, v_stride, n, weights, o, columns, alpha, product)
        self._weighted_values(e, *of_values, None)

    def _weighted_values(
        self, e: Emitter, values, v_part, v_stride, n, weights, o, columns, alpha, product, beside
    ) -> None:
        factors, parts = self._vectors(e, alpha), self.tile.parts

        def join(v: int, old: ir.Value, total: ir.Value) -> ir.Value:
            return e.fma(old, factors[v], total)

        of_parts = [e.offset(values, i, v_part) for i in range(parts)]
        self._value_tiles(e, of_parts, v_stride, n, weights, o, columns, product, join, beside)

    def add_rest_values(
        self, e: Emitter, values, v_stride, n, weights, o, columns, product
    ) -> None:
        """``O[d][lane] += sum_j v[j][d] * weight[j][lane]`` of the rests of values."""
        if self.tile.parts > 1:
            return
        factor = e.splat_const(1.0 / LIFT)

        def join(_: int, old: ir.Value, total: ir.Value) -> ir.Value:
            return e.fma(total, factor, old)

        self._value_tiles(e, [values], v_stride, n, weights, o, columns, product, join)

    def _stay_awake(self, e: Emitter) -> None:
        """Give the matrix unit something to do between its products.

        After some 0.6 microseconds without work it takes 0.3 to wake. What the tiles hold between
        two products does not matter.
        """
        self._instruct(e, "tdpbf16ps", I8(0), I8(1), I8(2))

    @contextmanager
    def _steps(self, e: Emitter, n: ir.Value) -> Iterator[ir.Value]:
        """Walk the multiples below n of what the tiles of rows hold."""
        count = ROW_TILES * ROWS
        rounds = e.builder.sdiv(e.builder.add(n, I64(count - 1)), I64(count))
        with e.loop(rounds) as i:
            yield e.builder.mul(i, I64(count))

    def _numbers(self) -> tuple[list[list[int]], list[int], list[int]]:
        """Numbers of the tiles that hold sums [row tile][vector], rows and lanes."""
        vectors, rows = self.tile.vectors, ROW_TILES
        sums = [[m * vectors + v for v in range(vectors)] for m in range(rows)]
        after = rows * vectors
        return (
            sums,
            [after + m for m in range(rows)],
            [after + rows + v for v in range(vectors)],
        )

    def _score_tiles(
        self, e: Emitter, k, k_stride, queries, first, head_dim, s=None, beside=None
    ) -> None:
        """Make the scores of some tiles of keys from ``first`` on; they stay in the sums.

        ``k`` and ``queries`` are lists of parts. Given ``s``, what the sums hold from the tiles of
        keys before goes there. ``beside(step)(turn)``, if given, emits what is done beside the
        products, before those of each turn.
        """
        build = e.builder
        _, rows, lanes = self._numbers()
        strides = [I64(self.row_bytes)] * len(queries)
        keys = [
            [e.offset(part, build.add(first, I64(m * ROWS)), k_stride) for m in range(len(rows))]
            for part in k
        ]
        target = None
        if s is not None:
            target = e.offset(s, build.sub(first, I64(ROW_TILES * ROWS)), self.row_bytes)

        def multiply(step: ir.Value, is_first: bool) -> None:
            left = [[e.offset(row, step, LINE) for row in part] for part in keys]
            panels = [e.offset(part, step, ROWS * self.row_bytes) for part in queries]
            right = [
                [build.add(panel, I64(v * LINE)) for v in range(len(lanes))] for panel in panels
            ]
            begin = self._begin(e, first, target) if is_first else None
            pairs, work = SCORE_PAIRS[len(k)], beside and beside(step)
            self._multiply(e, left, k_stride, right, strides, pairs, begin, work)

        self._first_and_others(e, build.ashr(build.add(head_dim, I64(31)), I64(5)), multiply)

    def _value_tiles(
        self, e: Emitter, values, v_stride, n, weights, o, columns, product, join, beside=None
    ) -> None:
        """Add n weighted values to the output, ``join(vector, old, total)`` being the new one.

        ``beside(first column, group of keys)(turn)``, if given, emits what is done beside the
        products, before those of each turn.
        """
        build = e.builder
        _, rows, lanes = self._numbers()
        count = len(rows) * ROWS
        strides = [I64(rows_apart * self.row_bytes) for rows_apart in (2, 2, 1)]

        def join_columns(first: ir.Value, count: ir.Value) -> None:
            with e.loop(count) as d:
                totals = e.pointer(e.offset(product, d, self.row_bytes))
                row = e.pointer(e.offset(o, build.add(first, d), self.row_bytes))
                for v in range(self.tile.vectors):
                    total = join(v, self._load(e, row, v), self._load(e, totals, v))
                    self._store(e, total, row, v)

        with self._steps(e, columns) as first:
            column = [e.offset(part, first, v_stride) for part in values]

            def multiply(group: ir.Value, is_first: bool, first=first, column=column) -> None:
                left = [
                    [
                        e.offset(e.offset(part, m * ROWS, v_stride), group, LINE)
                        for m in range(len(rows))
                    ]
                    for part in column
                ]
                first_part = e.offset(weights, group, MATRIX_KEYS * self.row_bytes)
                second_part = build.add(first_part, I64(self.row_bytes))
                third = build.add(weights, I64(self.third_part))
                third_part = e.offset(third, group, ROWS * self.row_bytes)
                right = [
                    [build.add(at, I64(v * LINE)) for v in range(len(lanes))]
                    for at in (first_part, second_part, third_part)
                ]
                begin = self._begin(e, first, product) if is_first else None
                pairs, work = VALUE_PAIRS[len(values)], beside and beside(first, group)
                self._multiply(e, left, v_stride, right, strides, pairs, begin, work)
                if is_first:
                    with build.if_then(build.icmp_signed(">", first, I64(0))):
                        join_columns(build.sub(first, I64(count)), I64(count))

            groups = build.ashr(build.add(n, I64(MATRIX_KEYS - 1)), I64(5))
            self._first_and_others(e, groups, multiply)
        self._store_tiles(e, product)
        last = build.and_(build.sub(columns, I64(1)), I64(-count))
        join_columns(last, build.sub(columns, last))

    def _first_and_others(
        self, e: Emitter, count: ir.Value, body: Callable[[ir.Value, bool], None]
    ) -> None:
        """Emit ``body(index, is it the first?)`` for the first index, and for the others."""
        body(I64(0), True)
        with e.loop(e.builder.sub(count, I64(1))) as i:
            body(e.builder.add(i, I64(1)), False)

    def _begin(
        self, e: Emitter, first: ir.Value, target: ir.Value | None
    ) -> Callable[[int, int], None]:
        """Return what makes a sum zero, once its product from the step before went to ``target``.

        A store takes as long as a product, and waits for the last one of its sum. Those that come
        one by one, each before the products that need its place, cost half of four in a row.
        """

        def begin(m: int, v: int) -> None:
            if target is not None:
                with e.builder.if_then(e.builder.icmp_signed(">", first, I64(0)), likely=True):
                    self._store_tile(e, m, v, target)
            self._instruct(e, "tilezero", I8(self._numbers()[0][m][v]))

        return begin

    def _multiply(
        self, e: Emitter, left, left_stride, right, right_strides, pairs, begin=None, beside=None
    ) -> None:
        """Add products of parts to the sums: left[part][row tile] times right[part][vector].

        ``begin`` comes before the first product of each sum, ``beside`` before those of each turn.
        """
        sums, rows, lanes = self._numbers()
        of_rows = of_lanes = None
        for turn, (i, j) in enumerate(pairs):
            if i != of_rows:
                for number, at in zip(rows, left[i], strict=True):
                    self._load_tile(e, number, at, left_stride)
            if j != of_lanes:
                for number, at in zip(lanes, right[j], strict=True):
                    self._load_tile(e, number, at, right_strides[j])
            if beside is not None:
                beside(turn)
            for v, lane in enumerate(lanes):
                for m, row in enumerate(rows):
                    if begin is not None and turn == 0:
                        begin(m, v)
                    self._instruct(e, "tdpbf16ps", I8(sums[m][v]), I8(row), I8(lane))
            of_rows, of_lanes = i, j

    def _store_last(self, e: Emitter, s: ir.Value, n: ir.Value) -> None:
        """Store the scores of the last of n keys, if there are any."""
        build, count = e.builder, ROW_TILES * ROWS
        with build.if_then(build.icmp_signed(">", n, I64(0))):
            last = build.and_(build.sub(n, I64(1)), I64(-count))
            self._store_tiles(e, e.offset(s, last, self.row_bytes))

    def _store_tiles(self, e: Emitter, target: ir.Value) -> None:
        for m in range(ROW_TILES):
            for v in range(self.tile.vectors):
                self._store_tile(e, m, v, target)

    def _store_tile(self, e: Emitter, m: int, v: int, target: ir.Value) -> None:
        number, at = self._numbers()[0][m][v], I64(m * ROWS * self.row_bytes + v * LINE)
        at = e.pointer(e.builder.add(target, at))
        self._instruct(e, "tilestored64", I8(number), at, I64(self.row_bytes))

    def _load_tile(self, e: Emitter, number: int, address: ir.Value, stride: ir.Value) -> None:
        self._instruct(e, "tileloadd64", I8(number), e.pointer(address), stride)

    def _instruct(self, e: Emitter, name: str, *operands: ir.Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        function = cgutils.get_or_insert_function(e.builder.module, kind, f"llvm.x86.{name}")
        e.builder.call(function, operands)
