"""Copies of what the matrix unit multiplies, in parts that are bfloat16.

* A float16 element is its 8 leading digits, the *main* part, and the *rest*, both exact. The
  product of two elements is four products.
* A bfloat16 element is one itself. But the matrix unit takes subnormal numbers for zeros, so those
  have a rest: ``LIFT`` times the number, exact and normal. Almost no block has any, and without
  one product will do.

Every copy is filled up with zeros to whole tiles.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.simd import FLOAT, HALF, I1, I8, I16, I32, I64, Emitter
from fusedattn.cpu.tile import MATRIX_KEYS

LIFT = 2.0**30
SMALLEST_NORMAL = 2.0**-126

# Rows of a tile of the matrix unit, and bytes of each.
ROWS, LINE = 16, 64


def filled(e: Emitter, n: ir.Value, unit: int) -> ir.Value:
    """Return the next multiple of a power of two."""
    return e.builder.and_(e.builder.add(n, I64(unit - 1)), I64(-unit))


def like(kind: ir.Type, value: float) -> ir.Constant:
    """Return a constant, or a vector of it."""
    vector = isinstance(kind, ir.VectorType)
    return ir.Constant(kind, [value] * kind.count if vector else value)


def any_of(e: Emitter, bits: ir.Value) -> ir.Value:
    """Return whether some bit of a vector is set."""
    if not isinstance(bits.type, ir.VectorType):
        return bits
    word = ir.IntType(bits.type.count)
    return e.builder.icmp_unsigned("!=", e.builder.bitcast(bits, word), word(0))


class Parts(Kernels):
    """The main parts of rows and their rests."""

    def split_keys(
        self, e: Emitter, target, part, target_stride, source, stride, step, n, columns, keep
    ) -> ir.Value:
        """Parts of n rows, each filled up with zeros to 32 columns; returns if there is a rest.

        ``part`` bytes lie between the parts. Rows whose byte in ``keep``, if given, is 0 are zero.
        """
        build = e.builder

        def row(j: ir.Value) -> tuple[ir.Value, ir.Value]:
            kept = e.variable(I8(1))
            with build.if_then(build.icmp_signed("!=", keep, I64(0))):
                build.store(e.load(build.add(keep, j), I8), kept)
            is_kept = build.icmp_unsigned("!=", build.load(kept), I8(0))
            return e.offset(source, j, stride), is_kept

        def write(is_rest: bool) -> ir.Value:
            to = build.add(target, part) if is_rest else target
            return self._split(e, is_rest, row, to, target_stride, step, n, columns, None)

        return self._main_and_rest(e, write)

    def pack_queries(self, e: Emitter, target, part, table, step, columns, sign, rows) -> ir.Value:
        """Parts of ``sign * row[lane][d]`` as ``[d // 2][lane][d % 2]``, filled up to 32 columns.

        ``table`` holds the address of each row, ``rows`` is room for one part of them. Returns if
        there is a rest.
        """
        build, width = e.builder, self.tile.width
        factor, stride = e.to_real(sign), filled(e, columns, 32)
        stride = build.mul(stride, I64(2))

        def row(lane: ir.Value) -> tuple[ir.Value, ir.Value]:
            return e.load(e.offset(table, lane, 8), I64, 8), I1(1)

        def write(is_rest: bool) -> ir.Value:
            lanes = I64(self.tile.lanes)
            found = self._split(e, is_rest, row, rows, stride, step, lanes, columns, factor)
            to = build.add(target, part) if is_rest else target
            with e.loop(build.sdiv(stride, I64(LINE))) as block, e.loop(self.tile.vectors) as v:
                first_row = e.offset(rows, build.mul(v, I64(width)), stride)
                first = e.offset(first_row, block, LINE)
                pairs = [e.load(e.offset(first, i, stride), e.i32vec, 4) for i in range(width)]
                place = e.offset(e.offset(to, block, ROWS * self.row_bytes), v, LINE)
                for i, lane_pairs in enumerate(e.transpose(pairs)):
                    e.store(lane_pairs, build.add(place, I64(i * self.row_bytes)), LINE)
            return found

        return self._main_and_rest(e, write)

    def split_values(
        self, e: Emitter, target, part, target_stride, source, stride, step, n, columns
    ) -> ir.Value:
        """Parts of n rows as ``[column][row]``, filled up to 32 rows; returns if there is a rest.

        ``part`` bytes lie between the parts.
        """
        build, width = e.builder, self.tile.width
        blocks = self._blocks(e, columns, step, self.tile.storage)
        last = build.sub(n, I64(1))
        groups = build.ashr(build.add(n, I64(MATRIX_KEYS - 1)), I64(5))

        def write(is_rest: bool) -> ir.Value:
            to = build.add(target, part) if is_rest else target
            found = e.variable(like(ir.VectorType(I1, width), 0))
            found_one = e.variable(I1(0))

            def half(j: ir.Value, offset: ir.Value, lanes: int, place: ir.Value) -> ir.Value:
                row = e.offset(source, e.minimum(j, last), stride)
                kind = ir.VectorType(I16, lanes) if lanes > 1 else I16
                raw = e.load(build.add(row, offset), kind)
                raw = build.select(build.icmp_signed("<=", j, last), raw, like(kind, 0))
                build.store(build.or_(build.load(place), self._has_rest(e, raw)), place)
                return self._part(e, raw, is_rest, None)

            with e.loop(blocks) as block, e.loop(groups) as group:
                d = build.mul(block, I64(width))
                offset, key = build.mul(d, step), build.mul(group, I64(MATRIX_KEYS))
                pairs = []
                for i in range(ROWS):
                    low, high = (
                        build.zext(
                            half(build.add(key, I64(2 * i + odd)), offset, width, found), e.i32vec
                        )
                        for odd in range(2)
                    )
                    pairs.append(build.or_(low, build.shl(high, e.splat_int(16, e.i32vec))))
                place = e.offset(e.offset(to, d, target_stride), group, LINE)
                for i, keys in enumerate(e.transpose(pairs)):
                    e.store(keys, e.offset(place, i, target_stride), LINE)
            done = build.mul(blocks, I64(width))
            with (
                e.loop(build.sub(columns, done)) as i,
                e.loop(build.mul(groups, I64(MATRIX_KEYS))) as j,
            ):
                d = build.add(done, i)
                value = half(j, build.mul(d, step), 1, found_one)
                e.store(value, e.offset(e.offset(to, d, target_stride), j, 2))
            return build.or_(any_of(e, build.load(found)), any_of(e, build.load(found_one)))

        return self._main_and_rest(e, write)

    def keep_values(self, e: Emitter, target, source, stride, n, columns, keep) -> None:
        """Copy n values of each column; those whose byte in ``keep`` is 0 become 0."""
        build = e.builder
        kind = ir.VectorType(I16, MATRIX_KEYS)
        with e.loop(build.ashr(build.add(n, I64(MATRIX_KEYS - 1)), I64(5))) as group:
            at = build.mul(group, I64(LINE))
            seen = e.load(e.offset(keep, group, MATRIX_KEYS), ir.VectorType(I8, MATRIX_KEYS))
            is_kept = build.icmp_unsigned("!=", seen, like(seen.type, 0))
            with e.loop(columns) as d:
                value = e.load(build.add(e.offset(source, d, stride), at), kind)
                value = build.select(is_kept, value, like(kind, 0))
                e.store(value, build.add(e.offset(target, d, stride), at))

    def _main_and_rest(self, e: Emitter, write: Callable[[bool], ir.Value]) -> ir.Value:
        """Write the main parts, and the rests if there are any; return 1 if so."""
        found = write(False)
        with e.builder.if_then(found):
            write(True)
        return e.builder.zext(found, I64)

    def _split(
        self, e: Emitter, is_rest, row, target, target_stride, step, n, columns, factor
    ) -> ir.Value:
        """One part of n rows; returns a bit that says if there is a rest."""
        build, width = e.builder, self.tile.width
        blocks = self._blocks(e, columns, step, self.tile.storage)
        done = build.mul(blocks, I64(width))
        found, found_one = e.variable(like(ir.VectorType(I1, width), 0)), e.variable(I1(0))
        whole = filled(e, columns, 32)
        with e.loop(n) as j:
            to, (of, is_kept) = e.offset(target, j, target_stride), row(j)

            def copy(d: ir.Value, kind: ir.Type, place: ir.Value, to=to, of=of) -> None:
                raw = e.load(e.offset(of, d, step), kind)
                raw = build.select(is_kept, raw, like(kind, 0))
                build.store(build.or_(build.load(place), self._has_rest(e, raw)), place)
                e.store(self._part(e, raw, is_rest, factor), e.offset(to, d, 2))

            with e.loop(blocks) as block:
                copy(build.mul(block, I64(width)), ir.VectorType(I16, width), found)
            with e.loop(build.sub(columns, done)) as i:
                copy(build.add(done, i), I16, found_one)
            with e.loop(build.sub(whole, columns)) as i:
                e.store(I16(0), e.offset(to, build.add(columns, i), 2))
        return build.or_(any_of(e, build.load(found)), any_of(e, build.load(found_one)))

    def _has_rest(self, e: Emitter, raw: ir.Value) -> ir.Value:
        """Where an element, by its bits, may have a rest."""
        build, kind = e.builder, raw.type
        if self.tile.storage == "bfloat16":  # subnormal: 1 to 127
            size = build.and_(raw, like(kind, 0x7FFF))
            before = build.sub(size, like(kind, 1))
            return build.icmp_unsigned("<", before, like(kind, 0x7F))
        low = build.and_(raw, like(kind, 7))  # digits past the first 8
        return build.icmp_unsigned("!=", low, like(kind, 0))

    def _part(self, e: Emitter, raw: ir.Value, is_rest: bool, factor: ir.Value | None) -> ir.Value:
        """Return one part of elements, times a factor of 1, 0 or -1, as the bits of a bfloat16."""
        build = e.builder
        lanes = raw.type.count if isinstance(raw.type, ir.VectorType) else 1
        shape = (lambda t: ir.VectorType(t, lanes)) if lanes > 1 else (lambda t: t)
        if self.tile.storage == "bfloat16":
            wide = build.shl(build.zext(raw, shape(I32)), like(shape(I32), 16))
            value = build.bitcast(wide, shape(FLOAT))
        else:
            value = build.fpext(build.bitcast(raw, shape(HALF)), shape(FLOAT))
        if factor is not None:
            value = build.fmul(value, e.splat(factor) if lanes > 1 else factor)
        digits = build.and_(build.bitcast(value, shape(I32)), like(shape(I32), -0x10000))
        if is_rest:
            zero = like(shape(FLOAT), 0.0)
            main = build.bitcast(digits, shape(FLOAT))
            if self.tile.storage == "bfloat16":
                lifted = build.fmul(value, like(shape(FLOAT), LIFT))
                size = build.bitcast(build.and_(digits, like(shape(I32), 0x7FFFFFFF)), shape(FLOAT))
                normal = like(shape(FLOAT), SMALLEST_NORMAL)
                is_subnormal = build.fcmp_ordered("<", size, normal)
                rest = build.select(is_subnormal, lifted, zero)
            else:  # of an infinity there is none
                same = build.fcmp_ordered("==", value, main)
                rest = build.select(same, zero, build.fsub(value, main))
            digits = build.bitcast(rest, shape(I32))
        return build.trunc(build.lshr(digits, like(shape(I32), 16)), shape(I16))
