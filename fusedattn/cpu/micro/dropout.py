"""Dropout of a tile of weights, by Philox4x32-10."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.simd import I32, I64, Emitter
from fusedattn.philox import KEY_STEPS, MULTIPLIERS, ROUNDS


class Dropout(Kernels):
    """Dropped weights become zero."""

    def drop(self, e: Emitter, s, n, first_key, threshold, seed, rows, heads, batch) -> None:
        """Zero the weights that dropout drops: Philox4x32-10 word ``key % 4`` below the threshold.

        Counter words (key // 4, row, head, batch), key words the seed, low word first.
        The formula of `fusedattn.philox`, a vector of rows at a time.
        """

        def change(kept: ir.Value, row: ir.Value, v: int) -> None:
            weight = self._load(e, row, v)
            self._store(e, e.builder.select(kept, weight, e.splat_const(0.0)), row, v)

        self._draw(e, s, n, first_key, threshold, seed, rows, heads, batch, change)

    def _draw(
        self, e: Emitter, s, n, first_key, threshold, seed, rows, heads, batch, change: Any
    ) -> None:
        """Call ``change(kept, row, vector index)`` for every vector of a tile."""
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
                counter = [
                    e.splat(build.trunc(group, I32)),
                    row_words[v],
                    head_words[v],
                    batch_word,
                ]
                for word, random in enumerate(self._philox(e, counter, seed)):
                    key = build.add(build.shl(group, I64(2)), I64(word))
                    inside = build.and_(
                        build.icmp_signed(">=", key, first_key), build.icmp_signed("<", key, end)
                    )
                    with build.if_then(inside):
                        at = e.offset(s, build.sub(key, first_key), self.row_bytes)
                        row = e.pointer(at)
                        change(build.icmp_unsigned(">=", random, bound), row, v)

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
