"""Pieces of the Hopper kernel: values that no row of a tile sees are cleared.

They may hold NaN, and 0 * NaN is no 0. Where intervals alone hide keys, the rows of a tile tell
which keys none of them sees. Where keys are hidden one by one, the warps tell each other: a thread
holds for its two rows the keys ``i // 2 * 8 + column + i % 2``, one bit each, and the four threads
of a row have a word each. All meet before they read, so whoever tells of a tile knows that what was
told of the last tile but one has been read. There is a place for each stage; where some tiles are
not told of (block masks), nobody meets at them, and two places take turns.
"""

# "not a == b" is true of NaN with every compiler; "a != b" is not.
# ruff: noqa: SIM201
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

from fusedattn.cuda import ptx
from fusedattn.cuda.hopper_scores import NO_KEY
from fusedattn.cuda.unroll import inlined, unrolled


class Pieces(NamedTuple):
    """What the kernel is written with."""

    tell_seen: Any
    clear_unseen: Any


def make(tools: Any, config: Any) -> Pieces:
    """Return the pieces, for one toolchain and `hopper.Config`."""
    types, asm = tools.types, tools.asm
    int32, float32 = types.int32, types.float32
    KEYS, SCORES = config.block_k, config.block_k // 2
    WARPS = 4 * config.warpgroups
    CONSUMERS, CHUNKS = config.threads - 128, config.block_k * config.dims_v // 8
    TELLS = config.features.hides or config.features.blocks
    # A word that says "seen" of all its keys.
    ALL_SEEN = (1 << KEYS // 4) - 1 if KEYS < 128 else -1

    tell_word, load_words = asm(ptx.STORE_SHARED_INT), asm(ptx.load_shared(4))
    store_zeros, proxy_fence = asm(ptx.STORE_SHARED_ZEROS), asm(ptx.PROXY_FENCE)
    warps_meet = asm(ptx.barrier(1, CONSUMERS))
    either, my_thread = asm(ptx.MAX_OR_NAN), asm(ptx.THREAD)
    swap_4, swap_8, swap_16 = (asm(ptx.swap_words(bit)) for bit in (4, 8, 16))

    @inlined
    def tell_seen(scores, seen_at):
        if TELLS:
            seen = int32(0)
            for i in unrolled(SCORES // 4):
                for j in unrolled(2):
                    if not either(scores[4 * i + j], scores[4 * i + j + 2]) == float32(NO_KEY):
                        seen = int32(seen | int32(1 << (2 * i + j)))
            seen = int32(seen | swap_4(seen))
            seen = int32(seen | swap_8(seen))
            seen = int32(seen | swap_16(seen))
            mine = int32(my_thread() - int32(128))
            if int32(mine & int32(31)) < 4:
                place = int32((mine >> int32(5)) * int32(16) + int32(mine & int32(3)) * int32(4))
                tell_word(int32(seen_at + place), seen)

    @inlined
    def clear_unseen(values, seen_at, key, key_lo, key_hi, words, some):
        if TELLS:
            for i in unrolled(4):
                words[i] = int32(0)
            warps_meet()
            for w in unrolled(WARPS):
                for i in unrolled(4):
                    some[i] = int32(0)
                load_words(some, int32(seen_at + 16 * w))
                for i in unrolled(4):
                    words[i] = int32(words[i] | some[i])
            if int32(words[0] & words[1] & words[2] & words[3]) != int32(ALL_SEEN):
                at = int32(my_thread() - int32(128))
                while at < int32(CHUNKS):
                    r = int32((at >> int32(3)) % int32(KEYS))
                    word = words[0]
                    for i in unrolled(1, 4):
                        if int32((r >> int32(1)) & int32(3)) == int32(i):
                            word = words[i]
                    bit = int32((r >> int32(3)) * int32(2) + (r & int32(1)))
                    if (word >> bit) & int32(1) == 0:
                        store_zeros(int32(values + at * int32(16)))
                    at = int32(at + CONSUMERS)
                proxy_fence()
                warps_meet()
        else:
            if key < key_lo or int32(key + KEYS) > key_hi:
                at = int32(my_thread() - int32(128))
                while at < int32(CHUNKS):
                    r = int32((at >> int32(3)) % int32(KEYS) + key)
                    if r < key_lo or r >= key_hi:
                        store_zeros(int32(values + at * int32(16)))
                    at = int32(at + CONSUMERS)
                proxy_fence()
                warps_meet()

    return Pieces(tell_seen, clear_unseen)
