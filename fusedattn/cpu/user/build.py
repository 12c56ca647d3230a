"""From a Python function to native passes over a tile.

Numba compiles the function for scalars (`fusedattn.cpu.user.typed`). Around it stands a loop over
the tile, written as LLVM IR; the function is inlined there and the loop over the lanes becomes
vectors. The object code is kept on disk under everything that the function depends on
(`UserFunction.fingerprint`).
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from fusedattn.block_mask import Predicate
from fusedattn.cpu.simd import DOUBLE, FLOAT, I8, I32, I64
from fusedattn.cpu.tile import Tile
from fusedattn.cpu.user.arithmetic import arithmetic_module, replace_calls
from fusedattn.cpu.user.reads import STATE, with_state
from fusedattn.cpu.user.typed import Joined, Typed
from fusedattn.functions import UserFunction

# Positions are below this: LLVM may compute with them in 32 bits.
_MOST = 1 << 30


def score_pass(function: UserFunction, tile: Tile) -> Any:
    """LLVM module of ``score_mod(s, n, first_key, rows, heads, batch, words)``: a pass over a tile.

    ``rows`` and ``heads`` hold an int32 for each lane, ``words`` the descriptions of the aux
    arrays.
    """
    real = types.float32 if tile.bits == 32 else types.float64
    typed = Typed(function, real)
    module = ir.Module(name="fusedattn_score_mod")

    def change(builder: Any, place: Any, _: Any, tables: Any, where: list[Any]) -> None:
        builder.store(typed.score(builder, builder.load(place), where, tables), place)

    element = FLOAT if tile.bits == 32 else DOUBLE
    loop = _pass(module, "score_mod", element, tile, typed.load_tables, change)
    return _optimised(_finished(module, loop), [typed.code])


def mask_pass(predicate: Predicate, tile: Tile) -> Any:
    """LLVM module of ``mask_mod(bytes, n, first_key, rows, heads, batch, words)``: 1 is seen."""
    joined = Joined(predicate, types.float64)
    module = ir.Module(name="fusedattn_mask_mod")

    def change(builder: Any, place: Any, _: Any, tables: Any, where: list[Any]) -> None:
        seen = joined.call(builder, predicate, tables, where)
        builder.store(builder.zext(seen, I8), place)

    loop = _pass(module, "mask_mod", I8, tile, lambda b, words, _: joined.load(b, words), change)
    return _optimised(_finished(module, loop), joined.codes)


def slope_pass(function: UserFunction, grad: UserFunction | None, tile: Tile) -> Any:
    """LLVM module of ``score_slope(d_scores, ..., words, raw)``: times the derivative at ``raw``.

    The other arguments are those of `score_pass`. A gradient of 0 stays one.
    """
    real = types.float32 if tile.bits == 32 else types.float64
    typed = Typed(function if grad is None else grad, real)
    if grad is None:
        typed.check_derivative()
    module = ir.Module(name="fusedattn_score_slope")
    element = FLOAT if tile.bits == 32 else DOUBLE
    one, zero = ir.Constant(element, 1.0), ir.Constant(element, 0.0)

    def change(builder: Any, place: Any, raw: Any, tables: Any, where: list[Any]) -> None:
        value, slope = typed.dual(builder, builder.load(raw), one, where, tables)
        given = builder.load(place)
        pulled = builder.fmul(given, slope if grad is None else value)
        is_zero = builder.fcmp_ordered("==", given, zero)
        builder.store(builder.select(is_zero, zero, pulled), place)

    loop = _pass(module, "score_slope", element, tile, typed.load_tables, change, beside=True)
    return _optimised(_finished(module, loop), [typed.code])


def aux_pass(function: UserFunction, tile: Tile) -> Any:
    """LLVM module of ``score_aux(d_scores, ..., words, raw, sums, offsets, count)``.

    Adds what each read of a floating aux array has to do with a result to ``sums[offsets[array] +
    element]``, key by key and lane by lane, for the first ``count`` lanes. A function that reads n
    elements is run n + 1 times: one run for the derivative by each.
    """
    real = types.float32 if tile.bits == 32 else types.float64
    element = FLOAT if tile.bits == 32 else DOUBLE
    typed = Typed(function, real, reads=True)
    typed.check_derivative()
    module = ir.Module(name="fusedattn_score_aux")
    numbers, indices = element.as_pointer(), I32.as_pointer()
    words_kind = I64.as_pointer()
    arguments = [numbers, I64, I64, indices, indices, I64, words_kind, numbers]
    kind = ir.FunctionType(ir.VoidType(), [*arguments, DOUBLE.as_pointer(), words_kind, I64])
    main = ir.Function(module, kind, "score_aux")
    d_scores, n, first_key, rows, heads, batch, words, raw, sums, offsets, count = main.args
    builder = ir.IRBuilder(main.append_basic_block("entry"))
    state = cgutils.alloca_once(builder, ir.ArrayType(I64, len(STATE)))
    state_at = builder.ptrtoint(state, I64)
    tables = [
        with_state(typed.context, builder, table, value, state_at)
        for table, value in zip(typed.tables, typed.load_tables(builder, words, 0), strict=True)
    ]

    def field(name: str) -> Any:
        return builder.gep(state, [I64(0), I64(STATE.index(name))])

    with cgutils.for_range(builder, n) as keys, cgutils.for_range(builder, count) as lanes:
        at = builder.add(builder.mul(keys.index, I64(tile.lanes)), lanes.index)
        given = builder.load(builder.gep(d_scores, [at]))
        is_some = builder.fcmp_unordered("!=", given, ir.Constant(element, 0.0))
        with builder.if_then(is_some):
            row, head = (builder.load(builder.gep(table, [lanes.index])) for table in (rows, heads))
            key = builder.add(first_key, keys.index)
            where = [batch, builder.zext(head, I64), builder.zext(row, I64), key]
            score = builder.load(builder.gep(raw, [at]))
            wanted = cgutils.alloca_once_value(builder, I64(0))
            again = builder.append_basic_block("read")
            done = builder.append_basic_block("done")
            builder.branch(again)
            builder.position_at_end(again)
            builder.store(I64(0), field("count"))
            builder.store(I64(-1), field("array"))
            builder.store(builder.load(wanted), field("wanted"))
            _, slope = typed.dual(builder, score, None, where, tables)
            array = builder.load(field("array"))
            with builder.if_then(builder.icmp_signed(">=", array, I64(0))):
                offset = builder.load(builder.gep(offsets, [array]))
                place = builder.gep(sums, [builder.add(offset, builder.load(field("element")))])
                share = builder.fmul(given, slope)
                if tile.bits == 32:
                    share = builder.fpext(share, DOUBLE)
                builder.store(builder.fadd(builder.load(place), share), place)
            following = builder.add(builder.load(wanted), I64(1))
            builder.store(following, wanted)
            more = builder.icmp_signed(">", builder.load(field("count")), following)
            builder.cbranch(more, again, done)
            builder.position_at_end(done)
    builder.ret_void()
    return _optimised(str(module), [typed.code])


def score_scalar(function: UserFunction) -> Any:
    """LLVM module of ``score_mod_one(score, batch, head, row, key, words) -> score`` in float64."""
    typed = Typed(function, types.float64)
    module = ir.Module(name="fusedattn_score_mod_one")
    kind = ir.FunctionType(DOUBLE, [DOUBLE, *[I64] * 4, I64.as_pointer()])
    main = ir.Function(module, kind, "score_mod_one")
    builder = ir.IRBuilder(main.append_basic_block())
    tables = typed.load_tables(builder, main.args[5], 0)
    builder.ret(typed.score(builder, main.args[0], list(main.args[1:5]), tables))
    return _optimised(str(module), [typed.code])


def mask_scalar(predicate: Predicate) -> Any:
    """LLVM module of ``mask_mod_one(batch, head, row, key, words) -> 0 or 1``."""
    joined = Joined(predicate, types.float64)
    module = ir.Module(name="fusedattn_mask_mod_one")
    main = ir.Function(module, ir.FunctionType(I64, [*[I64] * 4, I64.as_pointer()]), "mask_mod_one")
    builder = ir.IRBuilder(main.append_basic_block())
    tables = joined.load(builder, main.args[4])
    seen = joined.call(builder, predicate, tables, list(main.args[:4]))
    builder.ret(builder.zext(seen, I64))
    return _optimised(str(module), joined.codes)


def _pass(
    module: ir.Module,
    name: str,
    element: ir.Type,
    tile: Tile,
    load: Callable[[Any, Any, int], Any],
    change: Callable[[Any, Any, Any, Any, list[Any]], None],
    *,
    beside: bool = False,
) -> Any:
    """Write the loop over a tile; return the metadata of the loop over the lanes.

    The lanes of one vector are a loop of their own, so that LLVM turns it into straight code.
    """
    arguments = [element.as_pointer(), I64, I64, I32.as_pointer(), I32.as_pointer(), I64]
    arguments.append(I64.as_pointer())
    if beside:
        arguments.append(element.as_pointer())
    main = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    for argument in main.args:
        if isinstance(argument.type, ir.PointerType):
            argument.attributes.add("noalias")
    tile_at, n, first_key, rows, heads, batch, words, *other = main.args
    builder = ir.IRBuilder(main.append_basic_block("entry"))
    tables = load(builder, words, 0)
    positions = module.add_metadata([I32(0), I32(_MOST)])

    def lane_value(table: Any, lane: Any) -> Any:
        value = builder.load(builder.gep(table, [lane]))
        value.set_metadata("range", positions)
        return builder.zext(value, I64)

    # Keys inside: what depends on the rows and heads alone is computed once for all of them.
    with cgutils.for_range(builder, I64(tile.vectors)) as vectors:
        first = builder.mul(vectors.index, I64(tile.width))
        with cgutils.for_range(builder, n) as keys:
            key = builder.and_(builder.add(first_key, keys.index), I64(2 * _MOST - 1))
            row = builder.mul(keys.index, I64(tile.lanes))
            with _lanes(module, builder, tile.width) as (i, metadata):
                lane = builder.add(first, i)
                where = [batch, lane_value(heads, lane), lane_value(rows, lane), key]
                at = builder.add(row, lane)
                second = builder.gep(other[0], [at]) if beside else None
                change(builder, builder.gep(tile_at, [at]), second, tables, where)
    builder.ret_void()
    return metadata


@contextmanager
def _lanes(module: ir.Module, builder: Any, width: int) -> Iterator[tuple[Any, Any]]:
    """A loop of a fixed length that LLVM is told to make one vector of."""
    before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(I64)
    index.add_incoming(I64(0), before)

    def hint(name: str, *values: Any) -> Any:
        return module.add_metadata([ir.MetaDataString(module, f"llvm.loop.{name}"), *values])

    metadata = module.add_metadata(
        [
            hint("vectorize.width", I32(width)),
            hint("interleave.count", I32(1)),
            hint("unroll.disable"),
        ]
    )
    yield index, metadata
    following = builder.add(index, I64(1), flags=["nuw", "nsw"])
    index.add_incoming(following, builder.block)
    done = builder.icmp_unsigned("==", following, I64(width))
    builder.cbranch(done, after, body).set_metadata("llvm.loop", metadata)
    builder.position_at_end(after)


def _finished(module: ir.Module, loop: Any) -> str:
    """Text of a module whose loop metadata refers to itself, as LLVM identifies loops."""
    name = f"!{loop.name}"
    return str(module).replace(f"{name} = !{{ ", f"{name} = distinct !{{ {name}, ")


def _optimised(code: str, user_codes: list[str]) -> Any:
    """Link the user's functions in, and optimise; return the LLVM module.

    The loop over the lanes becomes a vector only if nothing is left to call in it. Where something
    is, LLVM must not be told to: it would say on stderr that it cannot.
    """
    module = _linked_and_run(code, user_codes, vectorize=False)
    if not _calls(module):
        module = _linked_and_run(code, user_codes, vectorize=True)
    _check_linked(module)
    return module


def _calls(module: Any) -> bool:
    """Whether optimised code still calls functions, LLVM's own apart."""
    names = [function.name for function in module.functions]
    return sum(not name.startswith("llvm.") for name in names) > 1


def _linked_and_run(code: str, user_codes: list[str], *, vectorize: bool) -> Any:
    from fusedattn.cpu.compile import host_machine

    machine = host_machine()
    module = llvm.parse_assembly(code)
    entry = next(function.name for function in module.functions if not function.is_declaration)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.link_in(llvm.parse_assembly(str(arithmetic_module())))
    for user_code in user_codes:
        module.link_in(llvm.parse_assembly(replace_calls(user_code)))
    for function in module.functions:
        if not function.is_declaration and function.name != entry:
            function.linkage = "internal"
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_unrolling, tuning.slp_vectorization = False, False
    tuning.loop_vectorization = vectorize
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return module


def _check_linked(module: Any) -> None:
    """Check that all that is called is there: LLVM would end the process over it."""
    for function in module.functions:
        name = function.name
        known = name.startswith("llvm.") or llvm.address_of_symbol(name)
        if function.is_declaration and not known:
            raise TypeError(f"a function of the user's calls {name}, which kernels do not have")
