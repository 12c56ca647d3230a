"""Pieces of the Hopper kernel: a row of results is written.

A thread holds two columns of each eight, and the four threads of a row hold all of them. Where rows
of a half type lie at multiples of 16 bytes, those four tell each other first: each then holds eight
neighbouring columns of every fourth group, which it stores at once. Two columns at a time take
several times as long, and the matrix unit waits for them at the end of each tile.
"""

# A piece assigns to its parameters, which are variables of the caller.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

from fusedattn.cuda import ptx
from fusedattn.cuda.unroll import inlined, unrolled


class Pieces(NamedTuple):
    """What the kernel is written with."""

    column_bytes: int  # from what a thread writes first to what its neighbour does, per column
    write_row: Any
    fill_row: Any


def make(tools: Any, config: Any) -> Pieces:
    """Return the pieces, for one toolchain and `hopper.Config`.

    A row starts for a thread at ``to``; its columns end at ``dims``, 0 for a row that is nobody's.
    """
    cuda, types, asm = tools.cuda, tools.types, tools.asm
    int32, int64 = types.int32, types.int64
    OUTPUTS = config.dims_v // 2
    WIDE, VECTORS = config.out_storage == "float32", config.vectors
    OUT_BYTES = 4 if WIDE else 2
    pack_out = asm(ptx.PACK["bfloat16" if WIDE else config.out_storage])
    store_word, store_floats = asm(ptx.STORE_WORD), asm(ptx.STORE_FLOATS)
    store_words, exchange = asm(ptx.STORE_WORDS), asm(ptx.exchange_words())

    @inlined
    def write_row(h, outputs, factor, to, column, dims):
        if VECTORS:
            words = cuda.local.array(4, int32)
            for group in unrolled(OUTPUTS // 16):
                for i in unrolled(4):
                    x = outputs[4 * (4 * group + i) + 2 * h] * factor
                    y = outputs[4 * (4 * group + i) + 2 * h + 1] * factor
                    words[i] = pack_out(x, y)
                exchange(words, column)
                if int32(column * int32(4) + group * 32) < dims:
                    store_words(to + int64(group * 64), words[0], words[1], words[2], words[3])
        else:
            for i in unrolled(OUTPUTS // 4):
                if int32(i * 8) < dims:
                    x, y = outputs[4 * i + 2 * h] * factor, outputs[4 * i + 2 * h + 1] * factor
                    if WIDE:
                        store_floats(to + int64(i * 8 * OUT_BYTES), x, y)
                    else:
                        store_word(to + int64(i * 8 * OUT_BYTES), pack_out(x, y))

    @inlined
    def fill_row(value, to, column, dims):
        bits = pack_out(value, value)
        if VECTORS:
            for group in unrolled(OUTPUTS // 16):
                if int32(column * int32(4) + group * 32) < dims:
                    store_words(to + int64(group * 64), bits, bits, bits, bits)
        else:
            for i in unrolled(OUTPUTS // 4):
                if int32(i * 8) < dims:
                    if WIDE:
                        store_floats(to + int64(i * 8 * OUT_BYTES), value, value)
                    else:
                        store_word(to + int64(i * 8 * OUT_BYTES), bits)

    return Pieces(8 if VECTORS else OUT_BYTES, write_row, fill_row)
