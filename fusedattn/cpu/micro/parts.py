"""Copies of what the matrix unit multiplies, in parts that are bfloat16.

* A float32 element is three parts of 8 digits, a float16 element two, which together are exact.
  Values of float32 are lifted by ``LIFT`` first. An infinity, a NaN, what such a lift makes
  infinite, and keys and queries of `MOST` or more have a NaN among their parts: the rows that see
  it end in the rescue, and nothing has to be fetched back from the ends of the range.
* A bfloat16 element is its own part. But the matrix unit takes subnormal numbers for zeros, so
  those have a *rest*: ``LIFT`` times the number, exact and normal. Almost no block has any.

Every copy is filled up with zeros to whole tiles.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from fusedattn.cpu.interface import LIFT
from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.simd import FLOAT, HALF, I1, I8, I16, I32, I64, Emitter
from fusedattn.cpu.tile import MATRIX_KEYS

SMALLEST_NORMAL = 2.0**-126
# Times this what is lost of the smallest keys and queries of float32 stays far below the roundings
# of a score (see the scales in `fusedattn.cpu.lowering`).
MOST = 2.0**56

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
    """The parts of rows."""

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

        def write(which: Sequence[int]) -> ir.Value:
            to = [e.offset(target, number, part) for number in which]
            return self._split(e, which, row, to, target_stride, step, n, columns, None)

        return self._always_and_rest(e, write)

    def pack_queries(self, e: Emitter, target, part, table, step, columns, sign, rows) -> ir.Value:
        """Parts of ``sign * row[lane][d]`` as ``[d // 2][lane][d % 2]``, filled up to 32 columns.

        ``table`` holds the address of each row, ``rows`` is room for the parts of them. Returns if
        there is a rest.
        """
        build, width, lanes = e.builder, self.tile.width, I64(self.tile.lanes)
        factor, stride = e.to_real(sign), filled(e, columns, 32)
        stride = build.mul(stride, I64(2))

        def row(lane: ir.Value) -> tuple[ir.Value, ir.Value]:
            return e.load(e.offset(table, lane, 8), I64, 8), I1(1)

        def write(which: Sequence[int]) -> ir.Value:
            places = [e.offset(rows, i, build.mul(lanes, stride)) for i in range(len(which))]
            found = self._split(e, which, row, places, stride, step, lanes, columns, factor)
            for number, split in zip(which, places, strict=True):
                to = e.offset(target, number, part)
                with e.loop(build.sdiv(stride, I64(LINE))) as block, e.loop(self.tile.vectors) as v:
                    first_row = e.offset(split, build.mul(v, I64(width)), stride)
                    first = e.offset(first_row, block, LINE)
                    pairs = [e.load(e.offset(first, i, stride), e.i32vec, 4) for i in range(width)]
                    place = e.offset(e.offset(to, block, ROWS * self.row_bytes), v, LINE)
                    for i, lane_pairs in enumerate(e.transpose(pairs)):
                        e.store(lane_pairs, build.add(place, I64(i * self.row_bytes)), LINE)
            return found

        return self._always_and_rest(e, write)

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
        lift = ir.Constant(FLOAT, LIFT) if self.is_wide else None

        def read(j: ir.Value, offset: ir.Value, lanes: int) -> ir.Value:
            row = e.offset(source, e.minimum(j, last), stride)
            kind = ir.VectorType(self.bits, lanes) if lanes > 1 else self.bits
            raw = e.load(build.add(row, offset), kind)
            return build.select(build.icmp_signed("<=", j, last), raw, like(kind, 0))

        def write(which: Sequence[int]) -> ir.Value:
            to = [e.offset(target, number, part) for number in which]
            found, found_one = self._nothing_found(e)

            with e.loop(blocks) as block, e.loop(groups) as group:
                d = build.mul(block, I64(width))
                offset, key = build.mul(d, step), build.mul(group, I64(MATRIX_KEYS))
                rows = [read(build.add(key, I64(j)), offset, width) for j in range(MATRIX_KEYS)]
                places = [e.offset(e.offset(at, d, target_stride), group, LINE) for at in to]
                split = []  # a line from 16 pairs
                for raw in rows:
                    self._note(e, raw, found)
                    split.append(self._parts(e, raw, which, lift, bounded=False))
                upper = e.splat_int(16, e.i32vec)
                for at, numbers in zip(places, zip(*split, strict=True), strict=True):
                    wide = [build.zext(bits, e.i32vec) for bits in numbers]
                    pairs = [
                        build.or_(low, build.shl(high, upper))
                        for low, high in zip(wide[::2], wide[1::2], strict=True)
                    ]
                    for i, keys in enumerate(e.transpose(pairs)):
                        e.store(keys, e.offset(at, i, target_stride), LINE)
            done = build.mul(blocks, I64(width))
            with (
                e.loop(build.sub(columns, done)) as i,
                e.loop(build.mul(groups, I64(MATRIX_KEYS))) as j,
            ):
                d = build.add(done, i)
                raw = read(j, build.mul(d, step), 1)
                self._note(e, raw, found_one)
                found_parts = self._parts(e, raw, which, lift, bounded=False)
                for at, bits in zip(to, found_parts, strict=True):
                    e.store(bits, e.offset(e.offset(at, d, target_stride), j, 2))
            return self._was_found(e, found, found_one)

        return self._always_and_rest(e, write)

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

    @property
    def is_wide(self) -> bool:
        """Whether elements have 32 bits."""
        return self.tile.storage == "float32"

    @property
    def bits(self) -> ir.IntType:
        """The type of the bits of an element."""
        return I32 if self.is_wide else I16

    @property
    def may_have_rest(self) -> bool:
        """Whether elements may have a rest."""
        return self.tile.storage == "bfloat16"

    def _always_and_rest(self, e: Emitter, write: Callable[[Sequence[int]], ir.Value]) -> ir.Value:
        """Write the parts that all elements have, and the rests if there are any; 1 if so."""
        parts = self.tile.parts
        found = write(range(parts))
        if not self.may_have_rest:
            return I64(0)
        with e.builder.if_then(found):
            write((parts,))
        return e.builder.zext(found, I64)

    def _split(
        self, e: Emitter, which, row, targets, target_stride, step, n, columns, factor
    ) -> ir.Value:
        """Some parts of n rows; returns a bit that says if there is a rest."""
        build, width = e.builder, self.tile.width
        blocks = self._blocks(e, columns, step, self.tile.storage)
        done = build.mul(blocks, I64(width))
        found, found_one = self._nothing_found(e)
        whole, kind = filled(e, columns, 32), ir.VectorType(self.bits, width)
        with e.loop(n) as j:
            to, (of, is_kept) = [e.offset(at, j, target_stride) for at in targets], row(j)

            def parts(d: ir.Value, kind: ir.Type, place: ir.Value, of=of) -> list[ir.Value]:
                raw = e.load(e.offset(of, d, step), kind)
                raw = build.select(is_kept, raw, like(kind, 0))
                self._note(e, raw, place)
                return self._parts(e, raw, which, factor)

            with e.loop(build.ashr(blocks, I64(1))) as line:
                d = build.mul(line, I64(2 * width))
                halves = [parts(build.add(d, I64(i * width)), kind, found) for i in range(2)]
                for at, low, high in zip(to, *halves, strict=True):
                    e.store(self._line(e, low, high), e.offset(at, line, LINE))
            with build.if_then(build.trunc(blocks, I1)):
                line = build.ashr(blocks, I64(1))
                alone = parts(build.mul(line, I64(2 * width)), kind, found)
                for at, low in zip(to, alone, strict=True):
                    e.store(self._line(e, low, like(low.type, 0)), e.offset(at, line, LINE))
            with e.loop(build.sub(columns, done)) as i:
                d = build.add(done, i)
                place = self._place_in_line(e, d)
                for at, bits in zip(to, parts(d, self.bits, found_one), strict=True):
                    e.store(bits, build.add(at, place))
            with e.loop(build.sub(whole, columns)) as i:
                place = self._place_in_line(e, build.add(columns, i))
                for at in to:
                    e.store(I16(0), build.add(at, place))
        return self._was_found(e, found, found_one)

    def _line(self, e: Emitter, low: ir.Value, high: ir.Value) -> ir.Value:
        """A line of two vectors of parts.

        Keys and queries may have their columns in any order that is the same for both. Where there
        are upper halves of 32 bits to be put together, the two vectors alternate: a shift and a
        selection, where neighbours would take shuffles.
        """
        if self.tile.parts == 1:
            return e.shuffle(low, high, range(2 * self.tile.width))
        low, high = (e.builder.zext(x, e.i32vec) for x in (low, high))
        return e.builder.or_(low, e.builder.shl(high, e.splat_int(16, e.i32vec)))

    def _place_in_line(self, e: Emitter, d: ir.Value) -> ir.Value:
        """How many bytes into a row the part of column d lies, as `_line` has it."""
        build, width = e.builder, self.tile.width
        if self.tile.parts == 1:
            return build.shl(d, I64(1))
        before, i = build.and_(d, I64(-2 * width)), build.and_(d, I64(width - 1))
        is_high = build.and_(build.sdiv(d, I64(width)), I64(1))
        place = build.add(before, build.add(build.shl(i, I64(1)), is_high))
        return build.shl(place, I64(1))

    def _nothing_found(self, e: Emitter) -> tuple[ir.Value, ir.Value]:
        """Return room for what `_note` finds: in vectors and in single elements."""
        return e.variable(like(ir.VectorType(I1, self.tile.width), 0)), e.variable(I1(0))

    def _was_found(self, e: Emitter, found: ir.Value, found_one: ir.Value) -> ir.Value:
        build = e.builder
        return build.or_(any_of(e, build.load(found)), any_of(e, build.load(found_one)))

    def _note(self, e: Emitter, raw: ir.Value, place: ir.Value) -> None:
        """Note whether an element, by its bits, has a rest: where it is subnormal, 1 to 127."""
        if not self.may_have_rest:
            return
        build, kind = e.builder, raw.type
        size = build.and_(raw, like(kind, 0x7FFF))
        has_rest = build.icmp_unsigned("<", build.sub(size, like(kind, 1)), like(kind, 0x7F))
        build.store(build.or_(build.load(place), has_rest), place)

    def _parts(
        self,
        e: Emitter,
        raw: ir.Value,
        which: Sequence[int],
        factor: ir.Value | None,
        *,
        bounded: bool = True,
    ) -> list[ir.Value]:
        """Return some parts of elements, times a factor, as the bits of bfloat16 numbers.

        The factor is 1, 0 or -1, of float32 any power of two. ``bounded``: `MOST` is a bound.
        """
        build = e.builder
        lanes = raw.type.count if isinstance(raw.type, ir.VectorType) else 1
        shape = (lambda t: ir.VectorType(t, lanes)) if lanes > 1 else (lambda t: t)
        value = self._number(e, raw, shape)
        if self.is_wide and bounded:
            usable = build.fcmp_ordered("<", self._size(e, value, shape), like(shape(FLOAT), MOST))
            value = build.select(usable, value, like(shape(FLOAT), math.nan))
        if factor is not None:
            value = build.fmul(value, e.splat(factor) if lanes > 1 else factor)
        if self.may_have_rest:
            digits = [self._itself_or_rest(e, value, shape, number) for number in which]
        else:
            digits = self._digits(e, value, shape)
        half = like(shape(I32), 16)
        return [build.trunc(build.lshr(x, half), shape(I16)) for x in digits]

    def _number(self, e: Emitter, raw: ir.Value, shape: Any) -> ir.Value:
        """Elements as float32."""
        build = e.builder
        if self.tile.storage == "float32":
            return build.bitcast(raw, shape(FLOAT))
        if self.tile.storage == "bfloat16":
            wide = build.shl(build.zext(raw, shape(I32)), like(shape(I32), 16))
            return build.bitcast(wide, shape(FLOAT))
        return build.fpext(build.bitcast(raw, shape(HALF)), shape(FLOAT))

    def _size(self, e: Emitter, value: ir.Value, shape: Any) -> ir.Value:
        bits = e.builder.bitcast(value, shape(I32))
        return e.builder.bitcast(e.builder.and_(bits, like(shape(I32), 0x7FFFFFFF)), shape(FLOAT))

    def _digits(self, e: Emitter, left: ir.Value, shape: Any) -> list[ir.Value]:
        """Parts that add up to a number: all but the last are rounded to nearest.

        So what is left has at most half a unit of the part, and of the products of two float32
        numbers the three that are not computed come to at most 2**-23 of it.
        """
        build, parts = e.builder, []
        for _ in range(self.tile.parts - 1):
            digits = build.add(build.bitcast(left, shape(I32)), like(shape(I32), 0x8000))
            parts.append(build.and_(digits, like(shape(I32), -0x10000)))
            left = build.fsub(left, build.bitcast(parts[-1], shape(FLOAT)))
        return [*parts, build.bitcast(left, shape(I32))]

    def _itself_or_rest(self, e: Emitter, value: ir.Value, shape: Any, number: int) -> ir.Value:
        """A bfloat16 number (part 0) or its rest (1), in the upper 16 bits."""
        build = e.builder
        if number == 0:
            return build.bitcast(value, shape(I32))
        normal, zero = (like(shape(FLOAT), x) for x in (SMALLEST_NORMAL, 0.0))
        lifted = build.fmul(value, like(shape(FLOAT), LIFT))
        is_subnormal = build.fcmp_ordered("<", self._size(e, value, shape), normal)
        return build.bitcast(build.select(is_subnormal, lifted, zero), shape(I32))
