"""Unrolling of loops and inlining of pieces in kernels, before any compiler sees them.

An array in local memory becomes registers only where each index is a constant. Compilers unroll
loops by their own lights, and one that stays a loop sends the whole array to slow memory, so the
loops over registers are written ``for i in unrolled(n)`` and unrolled here, on the syntax tree. In
the simulator they stay what they look like.

A long kernel is written in pieces that are called as statements and return nothing: functions
inside it, which say which of its variables they assign to (``nonlocal``), and ``@inlined`` ones
outside. Arguments are handed over by name: where a piece of the latter kind assigns to a parameter,
it assigns to the caller's variable. Other variables of a piece are its own.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

unrolled = range


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a piece of a kernel, to be written out where it is called."""
    function.__dict__["inlined"] = True
    return function


def unroll(function: Callable[..., Any], unsigned: Any, arity: int = 0) -> Callable[..., Any]:
    """Return the function with its ``unrolled`` loops written out and constants folded.

    Indices that remain are made `unsigned`, a type: a signed one may count from the end, which
    costs a comparison and a selection for each access. A ``*rest`` of parameters becomes as many
    as there are of the `arity`, here and where it is handed on.
    """
    space = {**function.__globals__, **_names(function), "unsigned": unsigned}
    definition = _definition(function)
    rest = definition.args.vararg
    spread: dict[str, list[str]] = {}
    if rest is not None:
        names = [f"{rest.arg}_{i}" for i in range(arity - len(definition.args.args))]
        definition.args.args += [ast.arg(name) for name in names]
        definition.args.vararg, spread[rest.arg] = None, names
    tree = ast.Module([definition], [])
    tree = ast.fix_missing_locations(_Unroller(space, spread).visit(tree))
    code = compile(tree, inspect.getsourcefile(function) or "<kernel>", "exec")
    exec(code, space)
    made = space[definition.name]
    assert isinstance(made, FunctionType)
    return made


def _names(function: Callable[..., Any]) -> dict[str, Any]:
    """What the names in a function stand for."""
    variables = inspect.getclosurevars(function)
    return {**variables.globals, **variables.nonlocals}


def _definition(function: Callable[..., Any]) -> ast.FunctionDef:
    """Parse a function anew; its decorators are left out."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    return definition


def _copied(tree: Any) -> Any:
    """Copy a syntax tree, or a list of them.

    Most of a kernel is copies of loops, and `copy.deepcopy` takes several times as long.
    """
    if isinstance(tree, list):
        return [_copied(part) for part in tree]
    if not isinstance(tree, ast.AST) or not tree._fields:
        return tree  # what has no parts is never changed
    made = tree.__class__.__new__(tree.__class__)
    made.__dict__.update(tree.__dict__)
    for name in tree._fields:
        value = made.__dict__.get(name)
        if isinstance(value, (ast.AST, list)):
            made.__dict__[name] = _copied(value)
    return made


class _Renamer(ast.NodeTransformer):
    """Puts the caller's arguments in the place of parameters, and new names in that of locals."""

    def __init__(self, places: dict[str, ast.expr], suffix: str) -> None:
        self._places = places
        self._suffix = suffix
        self.locals: set[str] = set()

    def visit_Name(self, node: ast.Name) -> Any:
        place = self._places.get(node.id)
        if place is not None:
            if isinstance(node.ctx, ast.Store):
                assert isinstance(place, ast.Name), f"{node.id} is assigned to, and no name"
                return ast.copy_location(ast.Name(place.id, ast.Store()), node)
            return ast.copy_location(_copied(place), node)
        if node.id in self.locals:
            node.id += self._suffix
        return node


class _Unroller(ast.NodeTransformer):
    """Replaces loops over `unrolled` by copies of their bodies, and folds integer constants."""

    def __init__(self, space: dict[str, Any], spread: dict[str, list[str]]) -> None:
        self._space, self._spread = space, spread
        self._known: dict[str, int] = {}
        self._inner: dict[str, ast.FunctionDef] = {}
        self._depth = 0
        self._pieces = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """Keep the pieces inside the kernel for where they are called."""
        if self._depth:
            self._inner[node.name] = node
            return None
        self._depth += 1
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        """Write a piece out."""
        call = node.value
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            return self.generic_visit(node)
        definition = self._piece(call.func.id)
        if definition is None:
            return self.generic_visit(node)
        assert not call.keywords
        parameters = [parameter.arg for parameter in definition.args.args]
        arguments = self.visit_Call(call).args
        if definition.args.vararg is not None:
            rest = arguments[len(parameters) :]
            self._spread[definition.args.vararg.arg] = [argument.id for argument in rest]
            arguments = arguments[: len(parameters)]
        said = [part for part in definition.body if isinstance(part, ast.Nonlocal)]
        outer = {name for part in said for name in part.names}
        body = [part for part in definition.body if part not in said]
        self._pieces += 1
        renamer = _Renamer(dict(zip(parameters, arguments, strict=True)), f"_{self._pieces}")
        renamer.locals = {
            name.id
            for name in ast.walk(definition)
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }.difference(parameters, outer)
        return self._written_out(renamer.visit(ast.Module(body, [])).body)

    def _piece(self, name: str) -> ast.FunctionDef | None:
        """Return what a name stands for, if that is a piece."""
        if name in self._inner:
            inner: ast.FunctionDef = _copied(self._inner[name])
            return inner
        function: Any = self._space.get(name)
        if not getattr(function, "inlined", False):
            return None
        for free, value in _names(function).items():
            assert self._space.setdefault(free, value) is value, f"{free} has two meanings"
        return _definition(function)

    def _written_out(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        for statement in statements:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            part = self.visit(statement)
            made += part if isinstance(part, list) else [part]
        return made or [ast.Pass()]

    def visit_For(self, node: ast.For) -> Any:
        call = node.iter
        if not (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == "unrolled"
            and isinstance(node.target, ast.Name)
        ):
            return self.generic_visit(node)
        bounds = [self._integer(self.visit(argument)) for argument in call.args]
        assert None not in bounds, f"line {node.lineno}: unrolled() needs constants"
        body: list[Any] = []
        for value in range(*bounds):  # type: ignore[arg-type]
            self._known[node.target.id] = value
            body += self._written_out(_copied(node.body))
        self._known.pop(node.target.id, None)
        return body or [ast.Pass()]

    def visit_If(self, node: ast.If) -> Any:
        """Choose a branch now where the condition is a constant of the kernel."""
        test = self._decided(node.test)
        if test is None:
            return self.generic_visit(node)
        return self._written_out(node.body if test else node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        """Choose an expression now where the condition is a constant of the kernel."""
        test = self._decided(node.test)
        if test is None:
            return self.generic_visit(node)
        return self.visit(node.body if test else node.orelse)

    def _decided(self, node: ast.expr) -> bool | None:
        """Return what a condition is, if that is known."""
        test: Any = None
        if isinstance(node, ast.Constant):
            test = node.value
        elif isinstance(node, ast.Name):
            test = self._space.get(node.id)
        return test if isinstance(test, bool) else None

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        """Make an index unsigned."""
        self.generic_visit(node)
        if self._integer(node.slice) is None:
            call = ast.Call(ast.Name("unsigned", ast.Load()), [node.slice], [])
            node.slice = ast.copy_location(call, node.slice)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        """Write out a ``*rest`` that is handed on."""
        self.generic_visit(node)
        arguments: list[ast.expr] = []
        for argument in node.args:
            inner = argument.value if isinstance(argument, ast.Starred) else None
            if isinstance(inner, ast.Name) and inner.id in self._spread:
                arguments += [ast.Name(name, ast.Load()) for name in self._spread[inner.id]]
            else:
                arguments.append(argument)
        node.args = arguments
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        if isinstance(node.ctx, ast.Load) and node.id in self._known:
            return ast.copy_location(ast.Constant(self._known[node.id]), node)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        left, right = self._integer(node.left), self._integer(node.right)
        if left is None or right is None or isinstance(node.op, ast.Div):
            return node
        whole = ast.Expression(ast.BinOp(ast.Constant(left), node.op, ast.Constant(right)))
        value = eval(compile(ast.fix_missing_locations(whole), "<constant>", "eval"))
        return ast.copy_location(ast.Constant(value), node)

    def _integer(self, node: ast.AST) -> int | None:
        value: Any = None
        if isinstance(node, ast.Constant):
            value = node.value
        elif isinstance(node, ast.Name):
            value = self._space.get(node.id)
        return value if type(value) is int else None
