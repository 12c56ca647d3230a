"""Functions of the macro loops: from Python, through Numba's front end, to one LLVM module.

Numba types each function and writes its LLVM IR; a program is all that its entry points call, in
one module, which is optimised once and as a whole. Numba by itself would optimise and link every
function for its own sake, and again in each that calls it: that takes twice the time.

A function compiles for its declared signature alone. A variable has one type throughout.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils
from numba.core.codegen import CodeLibrary
from numba.core.compiler import CompilerBase, Flags, compile_extra
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager
from numba.core.registry import cpu_target
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import FixupArgs, IRProcessing, TranslateByteCode

from fusedattn.cpu.simd import Emitter, define, make_intrinsic, numba_signature

_PASSES = (
    TranslateByteCode,
    FixupArgs,
    IRProcessing,
    NopythonTypeInference,
    PreLowerStripPhis,
    IRLegalization,
    NativeLowering,
)


class Entry(NamedTuple):
    """A C function of a program: its name, the plain function it is, its signature in letters."""

    name: str
    function: Callable[..., Any]
    signature: str


def kernel(signature: str) -> Callable[[Any], Any]:
    """Return a decorator that makes a function one that other kernels, and entries, can call.

    ``signature`` is as in `fusedattn.cpu.simd.define`, with ``b`` for bool and ``ii`` for a pair
    behind the ``>``.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        lowered = _Lowered(function, numba_signature(signature))
        return make_intrinsic(lowered.signature, lowered.call)

    return decorate


def emit_program(entries: Iterable[Entry]) -> Any:
    """Return the LLVM module of some entry points and all that they call, not yet optimised."""
    with global_compiler_lock:
        target = cpu_target.target_context
        cpu_target.typing_context.refresh()
        target.refresh()
        names: list[str] = []
        libraries: dict[Any, None] = {}
        module = ir.Module(name="fusedattn_program")
        for entry in entries:
            lowered = _Lowered(entry.function, numba_signature(entry.signature))
            lowered.enter(target, module, entry)
            names.append(entry.name)
            _collect(lowered.library, libraries)
        linked = llvm.parse_assembly(cgutils.normalize_ir_text(str(module)))
        for library in libraries:
            linked.link_in(library._get_module_for_linking(), preserve=True)
    for value in (*linked.functions, *linked.global_variables):
        if not value.is_declaration and value.name not in names:
            value.linkage = "internal"
    return linked


class _Lowered:
    """A function in LLVM IR, from the first time it is asked for."""

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self.signature = signature
        self._function = function
        self._found: tuple[Any, _Source] | None = None

    @property
    def library(self) -> _Source:
        return self._lower()[1]

    def call(self, context: Any, builder: Any, _: Any, values: Any) -> Any:
        """Emit a call from the function that is being lowered."""
        descriptor, library = self._lower()
        context.active_code_library.add_linking_library(library)
        return context.call_internal(builder, descriptor, self.signature, values)

    def enter(self, context: Any, module: ir.Module, entry: Entry) -> None:
        """Add a C function that calls this one; none of ours raises."""
        descriptor, _ = self._lower()
        kind = self.signature

        def write(e: Emitter, *values: ir.Value) -> ir.Value | None:
            callee = context.declare_function(module, descriptor)
            _, result = context.call_conv.call_function(
                e.builder, callee, kind.return_type, kind.args, values
            )
            return None if entry.signature.endswith(">") else result

        define(module, entry.name, entry.signature, write, 64, 1)

    def _lower(self) -> tuple[Any, _Source]:
        if self._found is None:
            flags: Any = Flags()
            flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
            flags.enable_ssa = False
            flags.error_model = "numpy"  # a division by zero gives inf or NaN, as it means to
            typing, target = cpu_target.typing_context, cpu_target.target_context
            library = _Source(target.codegen(), self._function.__name__)
            lowered: Any = compile_extra(
                typing,
                target,
                self._function,
                self.signature.args,
                self.signature.return_type,
                flags,
                {},
                library=library,
                pipeline_class=_FrontEnd,
            )
            self._found = lowered.fndesc, library
        return self._found


class _FrontEnd(CompilerBase):
    """What Numba does for plain scalar code, up to LLVM IR."""

    def define_pipelines(self) -> list[Any]:
        passes: Any = PassManager("front end")
        for each in _PASSES:
            passes.add_pass(each, each.__name__)
        passes.finalize()
        return [passes]


class _Source(CodeLibrary):
    """LLVM IR as it was written, and the libraries that it calls."""

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self.linked: list[Any] = []
        self._text = ""
        self._reload_init: set[str] = set()  # which older versions of Numba leave to us

    def add_ir_module(self, ir_module: Any) -> None:
        self._text = cgutils.normalize_ir_text(str(ir_module))

    def add_linking_library(self, library: Any) -> None:
        self.linked.append(library)

    def _get_module_for_linking(self) -> Any:
        return llvm.parse_assembly(self._text)

    def get_llvm_str(self) -> str:
        return self._text

    def get_asm_str(self) -> str:
        raise NotImplementedError("what is assembled is the program")

    def get_function(self, name: str) -> Any:
        raise NotImplementedError("what is compiled is the program")

    def finalize(self) -> None:
        """Nothing is left to do."""


def _collect(library: Any, found: dict[Any, None]) -> None:
    """Add a library, and those it calls, to the found ones."""
    if library not in found:
        found[library] = None
        for called in getattr(library, "linked", ()):
            _collect(called, found)
