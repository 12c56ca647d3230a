"""Rows to lanes and back: queries, outputs, tiles of the dense mask and of the bias."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from llvmlite import ir

from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.simd import I8, I32, I64, Emitter
from fusedattn.cpu.tile import STORAGE_BYTES


class Transposed(Kernels):
    """What lies row by row in memory and key by key, or column by column, in a tile."""

    def pack(self, e: Emitter, queries, table, step, head_dim, sign) -> None:
        """``queries[d][lane] = sign * row[lane][d]``; ``table`` holds the address of each row."""
        self._pack(e, self.tile.storage, queries, table, step, head_dim, sign)

    def gather(self, e: Emitter, target, table, step, columns, sign) -> None:
        """`pack` for rows that are reals."""
        self._pack(e, f"float{self.tile.bits}", target, table, step, columns, sign)

    def _pack(self, e: Emitter, storage, queries, table, step, head_dim, sign) -> None:
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

    def unpack(self, e: Emitter, o, factor, table, step, columns, check) -> None:
        """``row[lane][d] = o[d][lane] * factor[lane]``, rounded to the type of out.

        ``check[lane]`` becomes 0 if every element of the row is finite and NaN otherwise. Adding
        +0 turns -0 into +0: whether a hidden tile was skipped must not show in a sign of zero.
        """
        self._unpack(e, self.tile.out_storage, o, factor, table, step, columns, check)

    def _unpack(self, e: Emitter, storage, o, factor, table, step, columns, check) -> None:
        build, width = e.builder, self.tile.width
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

    def _transposed(self, e: Emitter, table, offset, step, n, dense, block, single) -> None:
        """Walk ``n`` keys of the rows in ``table`` from a byte offset on.

        ``block(first key, index of the vector, addresses)`` handles ``width`` keys of ``width``
        lanes that lie densely, ``single(key, lane, address)`` one element.
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

    def mask_tile(self, e: Emitter, target, table, offset, step, n, seen) -> ir.Value:
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

        return self.summary(e, target, n, seen)

    def both(self, e: Emitter, target, n, other) -> None:
        """``target[key][lane]`` stays where ``other[key][lane]`` is set too."""
        build, byte_vec = e.builder, ir.VectorType(I8, self.tile.width)
        with e.loop(build.mul(n, I64(self.tile.vectors))) as i:
            at, beside = (e.offset(bytes_at, i, self.tile.width) for bytes_at in (target, other))
            e.store(build.and_(e.load(at, byte_vec), e.load(beside, byte_vec)), at)

    def summary(self, e: Emitter, target, n, seen) -> ir.Value:
        """What a tile of a mask holds, as `mask_tile` says it; enters ``seen``."""
        build, width, lanes = e.builder, self.tile.width, self.tile.lanes
        byte_vec = ir.VectorType(I8, width)
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

    def bias_tile(self, e: Emitter, target, table, offset, step, n, storage) -> None:
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

            def single(key: ir.Value, lane: ir.Value, address: ir.Value, name: str = name) -> None:
                place = e.offset(e.offset(target, key, self.row_bytes), lane, size)
                e.store(e.load_storage(address, name), place)

            # A bias mostly comes in the type of its scores, or of the queries: those go by blocks.
            common = name in (self.tile.storage, f"float{self.tile.bits}")
            dense = build.icmp_signed("==", step, I64(stored if common else -1))
            with build.if_then(build.icmp_signed("==", storage, I64(code))):
                walk = block if common else lambda *_: None
                self._transposed(e, table, offset, step, n, dense, walk, single)
