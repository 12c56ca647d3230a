"""From a Python function to native passes over a tile.

Numba compiles the function for scalars. Around it stands a loop over the tile, written as LLVM IR;
the function is inlined there and the loop over the lanes becomes vectors. The object code is kept
on disk under everything that the function depends on (`UserFunction.fingerprint`).
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit as _njit
from numba import types
from numba.core import cgutils
from numba.core.errors import NumbaError

from fusedattn.block_mask import Predicate
from fusedattn.cpu.simd import DOUBLE, FLOAT, I1, I8, I32, I64
from fusedattn.cpu.tile import Tile
from fusedattn.cpu.user.arithmetic import arithmetic_module, replace_calls
from fusedattn.cpu.user.dual import Dual, make_dual, parts_of
from fusedattn.cpu.user.reads import STATE, observed, with_state
from fusedattn.cpu.user.table import Table, read_table, table_type, words_of
from fusedattn.functions import UserFunction, rebuilt
from fusedattn.pointwise import wrong_type

# Batch, head, row and key.
_INDICES = (types.int64,) * 4
# Positions are below this: LLVM may compute with them in 32 bits.
_MOST = 1 << 30

njit: Any = _njit
_OPTIONS = {
    "error_model": "numpy",
    "forceinline": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


class Typed:
    """A user's function compiled by Numba for one type of scores."""

    def __init__(self, function: UserFunction, real: Any, *, reads: bool = False) -> None:
        self.function = function
        tables: tuple[Table, ...] = tuple(
            table_type(name, ndim, real) for name, ndim in function.aux_kinds
        )
        if reads:
            tables = tuple(observed(table, number, real) for number, table in enumerate(tables))
        self.tables = tables
        self.real = real
        rest = (*_INDICES, *tables)
        if function.role == "mask_mod":
            self.arguments, compiled = rest, _typed(function, rest)
        else:
            # A dual keeps its type beside constants. What it cannot do, a plain number may.
            self.arguments = (Dual(real), *rest)
            try:
                compiled = _typed(function, self.arguments)
            except TypeError:
                self.arguments = (real, *rest)
                compiled = _typed(function, self.arguments)
        self.result = compiled.signature.return_type
        self._check_result()
        self.context = compiled.target_context
        self.name = compiled.fndesc.llvm_func_name
        self.code = str(compiled.library.get_llvm_str())

    def _check_result(self) -> None:
        is_bool = isinstance(self.result, types.Boolean)
        is_real = isinstance(self.result, (types.Float, types.Integer, Dual))
        if not (is_bool if self.function.role == "mask_mod" else is_real):
            raise TypeError(wrong_type(self.function, str(self.result)))

    def call(self, builder: Any, scalars: list[Any], tables: list[Any]) -> Any:
        """Call the function; its result in Numba's type."""
        convention = self.context.call_conv
        kind = convention.get_function_type(self.result, self.arguments)
        function = cgutils.get_or_insert_function(builder.module, kind, self.name)
        _, result = convention.call_function(
            builder, function, self.result, self.arguments, [*scalars, *tables]
        )
        return result

    def score(self, builder: Any, score: Any, where: list[Any], tables: list[Any]) -> Any:
        """Call a score_mod; its result as a real."""
        return self.dual(builder, score, None, where, tables)[0]

    def dual(
        self, builder: Any, score: Any, seed: Any, where: list[Any], tables: list[Any]
    ) -> tuple[Any, Any]:
        """Call a score_mod of a score with a slope; its result and the slope of that."""
        kind = self.arguments[0]
        if isinstance(kind, Dual):
            score = make_dual(self.context, builder, kind, score, seed)
        result = self.call(builder, [score, *where], tables)
        if isinstance(self.result, Dual):
            return parts_of(self.context, builder, self.result, result)
        zero = self.context.get_constant(self.real, 0.0)
        return self.context.cast(builder, result, self.result, self.real), zero

    def check_derivative(self) -> None:
        """Refuse what could be compiled for plain numbers alone."""
        if not isinstance(self.arguments[0], Dual):
            raise TypeError(
                f"{self.function.place} cannot be differentiated by compiled code; give its "
                "derivative by the score as score_mod_grad"
            )

    def load_tables(self, builder: Any, words: Any, first: int) -> list[Any]:
        """Load the aux arrays, whose descriptions begin at a word."""
        loaded = []
        for table in self.tables:
            loaded.append(read_table(self.context, builder, table, words, first))
            first += words_of(table.ndim)
        return loaded

    @property
    def words(self) -> int:
        """Length of the descriptions of the aux arrays."""
        return sum(words_of(table.ndim) for table in self.tables)


def _select(condition: Any, true: Any, false: Any) -> Any:
    return true if condition else false


def _clip(value: Any, low: Any, high: Any) -> Any:
    return min(max(value, low), high)


@functools.cache
def _numpy_of_scalars() -> ModuleType:
    """NumPy, but for ``where`` and ``clip``, which Numba knows of arrays alone.

    (Under the name of NumPy, for its error messages.)
    """
    module = ModuleType("numpy")
    module.__dict__.update(np.__dict__)
    module.__dict__.update(where=njit(**_OPTIONS)(_select), clip=njit(**_OPTIONS)(_clip))
    names = ("exp", "expm1", "log", "log1p", "sqrt", "tanh", "sin", "cos")
    module.__dict__.update({name: getattr(math, name) for name in names})
    module.__dict__.update(abs=abs, absolute=abs, arctan=math.atan, maximum=max, minimum=min)
    return module


def _for_numba(value: Any) -> Any:
    if value is np:
        return _numpy_of_scalars()
    is_array_function = value is np.where or value is np.clip
    return _numpy_of_scalars().__dict__[value.__name__] if is_array_function else value


def _positional(function: Any, count: int, compiled: Callable[[Any], Any]) -> Any:
    """Give a function as many arguments as it is called with: not more with defaults, nor ``*``."""
    code = function.__code__
    if code.co_argcount == count and not code.co_flags & inspect.CO_VARARGS:
        return function
    names = ", ".join(f"argument_{i}" for i in range(count))
    return eval(f"lambda {names}: function({names})", {"function": compiled(function)})


def _typed(function: UserFunction, arguments: tuple[Any, ...]) -> Any:
    """Compile through Numba, telling mistakes as mistakes of the user's function."""
    parts: list[Any] = []

    def compiled(part: Any) -> Any:
        parts.append(njit(**_OPTIONS)(part))
        return parts[-1]

    plain = rebuilt(function.function, _for_numba, compiled)
    dispatcher = compiled(_positional(plain, len(arguments), compiled))
    try:
        dispatcher.compile(arguments)
    except (NumbaError, NotImplementedError) as error:
        raise TypeError(explained(function, error)) from None
    for part in parts:
        _check_powers(function, part)
    return dispatcher.overloads[arguments]


def _check_powers(function: UserFunction, part: Any) -> None:
    """Refuse ``2 ** -head``: Python makes it a float, Numba a whole number, which is 0."""
    for version in part.overloads.values():
        found = version.type_annotation
        for expression, signature in found.calltypes.items():
            if getattr(expression, "op", None) not in ("binop", "inplace_binop"):
                continue
            is_power = expression.fn in (operator.pow, operator.ipow)
            if not is_power or not all(isinstance(kind, types.Integer) for kind in signature.args):
                continue
            exponent = getattr(found.typemap[expression.rhs.name], "literal_value", -1)
            if exponent < 0:
                raise TypeError(
                    f"{function.place} cannot be compiled: line {expression.loc.line} of "
                    f'"{expression.loc.filename}": a power of two integers is wrong where the '
                    "exponent is negative; make one of them a float, as in 2.0 ** n"
                ) from None


def explained(function: UserFunction, error: Exception) -> str:
    """Say what Numba could not compile, and where in the user's code."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines()]
    code = function.function.__code__
    place = re.findall(rf'File "{re.escape(code.co_filename)}", line (\d+)', text)
    # Numba names files by their last part, too.
    place = place or re.findall(r'File "[^"]+", line (\d+)', text)
    noise = ("Failed in", "During:", "File ", "There are", "- ", "<source", "def ", "^", "This ")
    lines = [line.removeprefix(">>> ") for line in lines]
    told = [line for line in lines if line and not line.startswith(noise)][:2]
    line = f", line {place[-1]}" if place else ""
    source = f'{line[2:]} of "{code.co_filename}": ' if line else ""
    return f"{function.place} cannot be compiled: {source}{' '.join(told)}"


class _Joined:
    """The functions of a predicate, or the one of a score_mod, side by side in one module."""

    def __init__(self, predicate: Predicate, real: Any) -> None:
        self.predicate = predicate
        self.typed: dict[int, tuple[Typed, int]] = {}
        first = 0
        for leaf in predicate.leaves():
            assert leaf.leaf is not None
            typed = Typed(leaf.leaf, real)
            self.typed[id(leaf)] = (typed, first)
            first += typed.words

    def load(self, builder: Any, words: Any) -> dict[int, list[Any]]:
        """Load the aux arrays of each function."""
        return {
            leaf: typed.load_tables(builder, words, first)
            for leaf, (typed, first) in self.typed.items()
        }

    def call(
        self, builder: Any, part: Predicate, tables: dict[int, list[Any]], where: list[Any]
    ) -> Any:
        """Evaluate a part of the predicate, to one bit."""
        if part.leaf is not None:
            typed, _ = self.typed[id(part)]
            batch, head, row, key = where
            batch = batch if part.by_batch else I64(0)
            head = head if part.by_head else I64(0)
            result = typed.call(builder, [batch, head, row, key], tables[id(part)])
            return result if result.type == I1 else builder.trunc(result, I1)
        first, *others = (self.call(builder, inner, tables, where) for inner in part.parts)
        if part.operation == "not":
            return builder.not_(first)
        join = builder.and_ if part.operation == "and" else builder.or_
        return join(first, others[0])

    @property
    def codes(self) -> list[str]:
        """Code of the functions."""
        return [typed.code for typed, _ in self.typed.values()]


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
    joined = _Joined(predicate, types.float64)
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
    joined = _Joined(predicate, types.float64)
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
