"""Unrolling of loops in kernels, before any compiler sees them.

An array in local memory becomes registers only where each index is a constant. Compilers unroll
loops by their own lights, and one that stays a loop sends the whole array to slow memory, so the
loops over registers are written ``for i in unrolled(n)`` and unrolled here, on the syntax tree. In
the simulator they stay what they look like.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

unrolled = range


def unroll(function: Callable[..., Any], unsigned: Any, arity: int = 0) -> Callable[..., Any]:
    """Return the function with its ``unrolled`` loops written out and constants folded.

    Indices that remain are made `unsigned`, a type: a signed one may count from the end, which
    costs a comparison and a selection for each access. A ``*rest`` of parameters becomes as many
    as there are of the `arity`, here and where it is handed on.
    """
    variables = inspect.getclosurevars(function)
    space = {**function.__globals__, **variables.nonlocals, "unsigned": unsigned}
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    rest = definition.args.vararg
    spread: dict[str, list[str]] = {}
    if rest is not None:
        names = [f"{rest.arg}_{i}" for i in range(arity - len(definition.args.args))]
        definition.args.args += [ast.arg(name) for name in names]
        definition.args.vararg, spread[rest.arg] = None, names
    tree = ast.fix_missing_locations(_Unroller(space, spread).visit(tree))
    code = compile(tree, inspect.getsourcefile(function) or "<kernel>", "exec")
    exec(code, space)
    made = space[definition.name]
    assert isinstance(made, FunctionType)
    return made


class _Unroller(ast.NodeTransformer):
    """Replaces loops over `unrolled` by copies of their bodies, and folds integer constants."""

    def __init__(self, space: dict[str, Any], spread: dict[str, list[str]]) -> None:
        self._space, self._spread = space, spread
        self._known: dict[str, int] = {}

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
            for statement in node.body:
                made = self.visit(copy.deepcopy(statement))
                body += made if isinstance(made, list) else [made]
        self._known.pop(node.target.id, None)
        return body or ast.Pass()

    def visit_If(self, node: ast.If) -> Any:
        """Choose a branch now where the condition is a constant of the kernel."""
        if isinstance(node.test, ast.Name) and isinstance(self._space.get(node.test.id), bool):
            body = node.body if self._space[node.test.id] else node.orelse
            made: list[Any] = []
            for statement in body:
                part = self.visit(statement)
                made += part if isinstance(part, list) else [part]
            return made or ast.Pass()
        return self.generic_visit(node)

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
