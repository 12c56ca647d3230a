"""The record of a call: what calls alike share, and what each brings along."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cpu.choice import STORAGE_NAME
from fusedattn.cpu.lowering import (
    address_of,
    lower_block_mask,
    lower_scores,
    lower_scratch,
    lower_work,
    out_strides,
)
from fusedattn.cpu.params import OFFSETS, OPERANDS, PARAMS, STOP
from fusedattn.cpu.tile import STORAGE_CODE, Tile
from fusedattn.cpu.user.words import describe_tables
from fusedattn.masks import relative_bounds
from fusedattn.problem import AttentionProblem, Lengths, batch_offsets

_INDEX = {name: offset // 8 for name, offset in OFFSETS.items()}
_WORDS = ctypes.c_int64 * len(_INDEX)
_ADDRESSES = tuple(_INDEX[name] for name in ("q", "k", "v", "out", "lse", "mask", "bias"))
_SLOPES, _SINKS = _INDEX["slopes"], _INDEX["sinks"]
_SCORE_WORDS = _INDEX["score_words"]
_RESCUE = (_INDEX["run_mark_visible"], _INDEX["run_rescue"])
_COUNTER, _STATES = _INDEX["counter"], _INDEX["states"]
_LENGTH_NAMES = ("k_from", "k_to", "q_offset", "seqused_q", "seqused_k")
_LENGTHS = tuple(_INDEX[name] for name in _LENGTH_NAMES)


class Bound:
    """The record of one call, and the arrays that it points to."""

    def __init__(
        self, words: Any, work: int, counts: NDArray[np.int64] | None, keep_alive: tuple[Any, ...]
    ) -> None:
        self.address = ctypes.addressof(words)
        self.work = work
        self._words = words
        self._counts = counts
        self._keep_alive = keep_alive

    def enter_rescue(self, addresses: tuple[int, int]) -> None:
        """Enter the functions of the rescue."""
        self._words[_RESCUE[0]], self._words[_RESCUE[1]] = addresses

    def enter_functions(self, addresses: dict[str, int]) -> None:
        """Enter functions of the user's."""
        for name, address in addresses.items():
            self._words[_INDEX[f"run_{name}"]] = address

    def stop(self) -> None:
        """Make the workers leave what they have not begun."""
        self._words[_COUNTER] = STOP

    def start_over(self) -> None:
        """Let the next workers begin with the first item again."""
        self._words[_COUNTER] = 0
        if self._counts is not None:
            self._counts[:] = 0


class Template:
    """All that a call's record holds before its arrays are known; reused by calls alike."""

    def __init__(
        self, problem: AttentionProblem, tile: Tile, natives: dict[str, int], threads: int
    ) -> None:
        self.record = np.zeros((), PARAMS)
        self._tables: list[NDArray[Any]] = []
        for name, address in natives.items():
            self.record[f"run_{name}"] = address
        self._lower_operands(problem)
        self._relative_bounds = relative_bounds(problem.causal, problem.window_size, 0)
        lengths = Lengths(problem.q_offset, problem.seqused_q, problem.seqused_k)
        for name, table in zip(_LENGTH_NAMES, self._length_tables(lengths), strict=True):
            self._table(name, table)
        self._mask_words = lower_block_mask(problem, self.record)
        lower_work(problem, tile, self.record, threads)
        lower_scores(problem, self.record)
        lower_scratch(tile, self.record)
        self.scratch_bytes = int(self.record["scratch_bytes"])
        self.items = int(self.record["items"])
        self.chunks = int(self.record["chunks"])
        self._partial_bytes = int(self.record["partial_bytes"])
        self._accumulator = problem.accumulator
        self._slopes_shape = problem.lse_shape[:-1]
        self._image = self.record.tobytes()

    def bind(
        self,
        operands: tuple[NDArray[Any] | None, ...],
        slopes: NDArray[Any] | None,
        sinks: NDArray[Any] | None,
        lengths: Lengths | None,
        aux: tuple[NDArray[Any], ...],
        split: bool,
    ) -> Bound:
        """Return the record of a call on ``(q, k, v, out, lse, mask, bias)`` and the rest.

        ``lengths`` are the call's own, or None if they are those of the template's problem; ``aux``
        are the arrays of its score_mod;
        ``split``: whether the chunks of an item may go to several threads.
        """
        words = _WORDS.from_buffer_copy(self._image)
        tables: tuple[NDArray[np.int64], ...] = ()
        if lengths is not None:
            tables = self._length_tables(lengths)
            for index, table in zip(_LENGTHS, tables, strict=True):
                words[index] = address_of(table)
        for index, array in zip(_ADDRESSES, operands, strict=True):
            if array is not None:
                words[index] = address_of(array)
        if slopes is not None:
            slopes = self._in_float64(np.broadcast_to(slopes, self._slopes_shape))
            words[_SLOPES] = address_of(slopes)
        if sinks is not None:
            sinks = self._in_float64(sinks)
            words[_SINKS] = address_of(sinks)
        described = describe_tables(aux) if aux else None
        if described is not None:
            words[_SCORE_WORDS] = ctypes.addressof(described)
        work, states, counts = self.items, None, None
        if split:
            work *= self.chunks
            states = np.empty(self.items + work * self._partial_bytes // 8, np.int64)
            counts = states[: self.items]
            counts.fill(0)
            words[_STATES] = address_of(states)
        return Bound(
            words, work, counts, (self, operands, slopes, sinks, tables, states, aux, described)
        )

    def _in_float64(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Slopes or sinks, which count in the accumulator type whatever they are stored in."""
        with np.errstate(all="ignore"):  # a NaN or an infinity is an answer here, no accident
            return values.astype(self._accumulator).astype(np.float64, order="C")

    def _table(self, name: str, values: NDArray[Any]) -> None:
        """Enter the address of a table that lives as long as this object."""
        self._tables.append(values)
        self.record[name] = address_of(values)

    def _lower_operands(self, problem: AttentionProblem) -> None:
        """Strides and batch offsets."""
        operands = {name: getattr(problem, name) for name in ("q", "k", "v", "mask", "bias")}
        strides = {"out": out_strides(problem)}
        strides |= {name: array.strides for name, array in operands.items() if array is not None}
        for name, steps in strides.items():
            for axis, stride in zip(OPERANDS[name], steps[-3:], strict=True):
                self.record[f"{name}_{axis}"] = stride
            self._table(f"{name}_offsets", batch_offsets(problem.batch_shape, steps))
        for name in ("num_heads", "group_size", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"):
            self.record[name] = getattr(problem, name)
        if problem.bias is not None:
            self.record["bias_storage"] = STORAGE_CODE[STORAGE_NAME[problem.bias.dtype]]

    def _length_tables(self, lengths: Lengths) -> tuple[NDArray[np.int64], ...]:
        """Tables in the order of `_LENGTHS`: the bounds of the keys seen, relative to the row."""
        k_from, k_to = self._relative_bounds
        return (lengths.q_offset + k_from, lengths.q_offset + k_to, *lengths)
