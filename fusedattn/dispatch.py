"""Backends: what they are, which one runs a problem, and why the others do not."""

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from fusedattn.checks import Array
from fusedattn.problem import AttentionProblem, Gradients, Lengths, Result
from fusedattn.undisturbed import undisturbed


class Prepared(Protocol):
    """What a backend makes of a problem, to run it and others that differ in contents only."""

    def run(
        self,
        operands: tuple[Array | None, ...],
        slopes: Array | None,
        sinks: Array | None,
        lengths: Lengths | None = None,
        aux: tuple[Array, ...] = (),
    ) -> None:
        """Compute into out and lse of the operands ``(q, k, v, out, lse, mask, bias)``."""


class Backend(Protocol):
    """What runs a problem.

    A backend may also have ``describe(problem) -> list[str]``: lines that say which of its kernels
    would run, for `explain`; and ``prepare(problem) -> Prepared``, for `fusedattn.plan`.
    """

    @property
    def name(self) -> str:
        """The name that `attention(backend=...)` takes."""

    def unsupported(self, problem: AttentionProblem) -> list[str]:
        """Reasons why the problem cannot run here; empty if it can."""

    def forward(self, problem: AttentionProblem) -> Result:
        """Compute `out`, into ``problem.out`` if given, and `lse` if asked for."""

    def unsupported_backward(self, problem: AttentionProblem) -> list[str]:
        """Reasons why the gradients of the problem cannot be computed here; empty if they can."""

    def backward(
        self,
        problem: AttentionProblem,
        d_out: Array,
        out: Array,
        lse: Array,
        d_lse: Array | None,
        *,
        bias_grad: bool,
    ) -> Gradients:
        """Pull `d_out` and `d_lse` back to the operands, given what the forward returned.

        All arrays are in canonical axis order; `d_bias` is None without `bias_grad`.
        """


# In the order of preference, by place of definition: a backend is imported when it is first asked,
# so that `import fusedattn` stays light.
_PLACES = {
    "cpu": ("fusedattn.cpu.backend", "CPU"),
    "cuda": ("fusedattn.cuda.backend", "CUDA"),
    "blocked": ("fusedattn.blocked", "BLOCKED"),
    "reference": ("fusedattn.reference", "REFERENCE"),
}
NAMES = tuple(_PLACES)

_loaded: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """Return a backend by name.

    Raises
    ------
    ValueError
        If there is no backend of that name.
    """
    if not isinstance(name, str) or name not in _PLACES:
        raise ValueError(f"backend must be None or one of {', '.join(NAMES)}, but is {name!r}")
    backend = _loaded.get(name)
    if backend is None:
        module, attribute = _PLACES[name]
        backend = _loaded[name] = getattr(undisturbed(import_module, module), attribute)
    return backend


def choose(
    problem: AttentionProblem, backend: str | None = None, *, backward: bool = False
) -> Backend:
    """Return the backend asked for, or the first that can run the problem (or its gradient).

    Raises
    ------
    NotImplementedError
        If the backend asked for cannot run the problem (it never falls back silently), or none can.
        The message lists the reasons of each.
    """
    for name in NAMES if backend is None else (backend,):
        if not _reasons(name, problem, backward):
            return load(name)
    asked = "no backend" if backend is None else f"backend {backend!r} not"
    what = "compute the gradient of this problem" if backward else "run this problem"
    reasons = "\n".join(_reason(name, _reasons(name, problem, backward)) for name in NAMES)
    raise NotImplementedError(f"{asked} able to {what}\n{reasons}")


def check_indices(problem: AttentionProblem) -> None:
    """Ask the score_mod about every visible pair in NumPy, which refuses an index outside.

    Raises
    ------
    IndexError
        Naming the function, its file and line, and the pair.
    """
    from fusedattn.blocked.tile import score_tiles

    for _ in score_tiles(problem):
        pass


def _reasons(name: str, problem: AttentionProblem, backward: bool) -> list[str]:
    """Ask a backend why it cannot."""
    backend = load(name)
    return backend.unsupported_backward(problem) if backward else backend.unsupported(problem)


def _reason(name: str, reasons: list[str]) -> str:
    return f"  {name}: {'; '.join(reasons) if reasons else 'can run it'}"


@dataclass(frozen=True)
class Explanation:
    """What would run and why; print it, or read the fields.

    Attributes
    ----------
    backend
        Name of the backend that would run, None if the one asked for cannot.
    reasons
        For each backend the reasons why it cannot run the problem; an empty list if it can.
    details
        What the backend says about the kernel it would run.
    problem
        The resolved problem.
    """

    backend: str | None
    reasons: dict[str, list[str]]
    details: list[str]
    problem: AttentionProblem

    def __str__(self) -> str:
        """Several lines for a person to read."""
        head = f"runs on {self.backend}" if self.backend else "does not run where it was asked to"
        lines = [head, *("  " + line for line in self.details), *_facts(self.problem)]
        lines += (_reason(name, reasons) for name, reasons in self.reasons.items())
        return "\n".join(lines)


def explain(problem: AttentionProblem, backend: str | None = None) -> Explanation:
    """Ask every backend; nothing is computed."""
    if backend is not None:
        load(backend)
    reasons = {name: load(name).unsupported(problem) for name in NAMES}
    able = [name for name in NAMES if not reasons[name] and backend in (None, name)]
    details: list[str] = []
    if able:
        describe = getattr(load(able[0]), "describe", None)
        details = [] if describe is None else describe(problem)
    return Explanation(able[0] if able else None, reasons, details, problem)


def _facts(problem: AttentionProblem) -> list[str]:
    """Describe shapes, options that are on, and work."""
    options = [f"scale {problem.scale:.6g}"]
    options += ["causal"] if problem.causal else []
    if problem.window_size != (None, None):
        options.append(f"window_size {problem.window_size}")
    if problem.softcap is not None:
        options.append(f"softcap {problem.softcap:.6g}")
    if problem.dropout_p:
        options.append(f"dropout_p {problem.dropout_p:.6g}")
    operands = {
        "mask": problem.mask,
        "bias": problem.bias,
        "alibi_slopes": problem.alibi_slopes,
        "sinks": problem.sinks,
    }
    options += [name for name, array in operands.items() if array is not None]
    if problem.score_mod is not None:
        options.append(problem.score_mod.place)
    if problem.block_mask is not None:
        options.append(f"block_mask {problem.block_mask.sparsity:.0%} empty")
    pairs = problem.batch_size * problem.num_heads * problem.seqlen_q * problem.seqlen_k
    everything = 2 * (problem.head_dim + problem.head_dim_v) * pairs
    part = problem.flops / everything if everything else 0.0
    return [
        f"  q {problem.q.shape}, k {problem.k.shape}, v {problem.v.shape}, {problem.dtype}, "
        f"accumulated in {problem.accumulator}, out {problem.out_dtype}",
        f"  {', '.join(options)}",
        f"  {problem.flops / 1e9:.3g} GFLOP over the key intervals ({part:.0%} of all pairs), "
        f"{problem.bytes_moved / 2**20:.3g} MiB of inputs and outputs",
    ]
