"""Judge an attention function: try each law on drawn calls and report."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis.errors import HypothesisException

from fusedattn import checks
from fusedattn.problem import AttentionProblem
from fusedattn.testing.cases import Case
from fusedattn.testing.kernel import Kernel, OutsideDomain, as_dtypes, as_names, as_supports
from fusedattn.testing.laws import ALL, Law
from fusedattn.testing.report import Failure, Outcome, Report, runnable

# A smaller example is looked for this long, or through this many calls.
_SHRINK_SECONDS = 6.0
_SHRINK_CALLS = 400


class _Broken(Exception):
    """The law does not hold on this call: one type and one line, so that shrinking sees one bug."""


class _Enough(BaseException):
    """The example is small enough; leaves Hypothesis at once."""


def check_attention(
    fn: Callable[..., Any],
    *,
    supports: Iterable[str] = (),
    dtypes: Iterable[str] = ("float32",),
    returns_lse: bool = False,
    gradient: Callable[..., Any] | None = None,
    bitwise: bool = False,
    deterministic: bool = True,
    domain: Callable[[AttentionProblem], str | None] | None = None,
    max_examples: int = 100,
    seed: int | None = None,
    laws: Iterable[str] | None = None,
    xfail: Mapping[str, str] | str | Path | None = None,
    set_threads: Callable[[int], Any] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Report:
    """Hold an attention function to the laws of attention.

    Parameters
    ----------
    fn : callable
        ``fn(q, k, v, **keywords)`` on NumPy arrays, with the keywords of `fusedattn.attention` or
        any subset of them. q is ``(batch, heads, seqlen_q, head_dim)``.
    supports : iterable of str
        The keywords that the function takes, and its capabilities: ``gqa``, ``head_dim_v``,
        ``leading_axes``, ``zero_size``, ``strides``, ``unseen_nan``, ``hidden_nan``,
        ``full_range``, and ``d_lse`` for its gradient. Keywords that are not named are not passed,
        and must raise. ``half_weights`` confesses that weights are rounded to a half type.
    dtypes : iterable of str
        Types of q, k and v that the function takes.
    returns_lse : bool
        Whether it always returns ``(out, lse)``. With ``return_lse`` in `supports` it does so when
        asked.
    gradient : callable, optional
        ``gradient(d_out, q, k, v, out, lse, **keywords)`` returns ``(d_q, d_k, d_v)``, followed by
        ``d_bias`` and ``d_sinks`` if it has them.
    bitwise : bool
        Declares that neighbours in the batch, strides, layout and threads change no bit. Otherwise
        those laws hold within the budget.
    deterministic : bool
        Whether the same call gives the same bits.
    domain : callable, optional
        ``domain(problem)`` returns None for calls that the function admits, else the reason why
        not: head dims, divisibility, anything.
    max_examples : int
        Calls drawn for a law; laws that call often and single features get a part of it.
    seed : int, optional
        Seed of all draws. Without it one is chosen and reported.
    laws : iterable of str, optional
        Names of the laws to try, or beginnings such as ``"equals_reference["``; all by default.
    xfail : mapping, or path of a file, optional
        Laws known to fail, with reasons. A law that holds in spite of it fails the check. The file
        has lines ``law: reason``.
    set_threads : callable, optional
        ``set_threads(n)``, where the number of threads can be chosen.
    progress : callable, optional
        Called as ``progress(law, done, total)`` before each law and after the last.

    Returns
    -------
    Report
        ``report.ok``, ``report.failures``; prints as a table.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as it should be: a law, a capability or a dtype that does not exist,
        no dtype or no law at all. Whatever `fn` raises is a failure of a law, and in the report.

    Examples
    --------
    >>> import numpy as np
    >>> def softmax_attention(q, k, v):
    ...     scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1]))
    ...     weights = np.exp(scores - scores.max(-1, keepdims=True))
    ...     return weights / weights.sum(-1, keepdims=True) @ v
    >>> check_attention(softmax_attention, max_examples=5, seed=0).ok
    True
    """
    kernel = Kernel(
        fn,
        supports=as_supports(supports),
        dtypes=as_dtypes(dtypes),
        returns_lse=returns_lse,
        gradient=gradient,
        bitwise=bitwise,
        deterministic=deterministic,
        domain=domain,
        set_threads=set_threads,
    )
    chosen = select_laws(laws)
    expected = read_xfail(xfail)
    checks.integer("max_examples", max_examples, 1, 2**31)
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    checks.integer("seed", seed, 0, 2**64 - 1)
    outcomes = []
    for done, law in enumerate(chosen):
        if progress is not None:
            progress(law.name, done, len(chosen))
        outcomes.append(try_law(law, kernel, max_examples, seed, expected.get(law.name)))
    if progress is not None:
        progress("", len(chosen), len(chosen))
    return Report(kernel.name, seed, tuple(outcomes))


def select_laws(names: Iterable[str] | None) -> tuple[Law, ...]:
    """Return the laws that have one of these names, or else begin with one."""
    if names is None:
        return ALL
    wanted = as_names("laws", names)
    if not wanted:
        raise ValueError("laws must name at least one law, or be None for all, but is empty")
    for name in wanted:
        if not any(law.name.startswith(name) for law in ALL):
            raise ValueError(f"there is no law {name!r}; the laws are {[law.name for law in ALL]}")
    exact = {law.name for law in ALL}.intersection(wanted)
    beginnings = tuple(name for name in wanted if name not in exact)
    return tuple(
        law for law in ALL if law.name in exact or (beginnings and law.name.startswith(beginnings))
    )


def read_xfail(xfail: Mapping[str, str] | str | Path | None) -> dict[str, str]:
    """Return the laws known to fail, with reasons."""
    if xfail is None:
        return {}
    if isinstance(xfail, Mapping):
        known = dict(xfail)
    elif not isinstance(xfail, (str, Path)):
        raise TypeError(
            "xfail must be a mapping of laws to reasons or the path of a file, but is "
            f"{checks.describe(xfail)}"
        )
    else:
        lines = [line.split("#")[0].strip() for line in Path(xfail).read_text().splitlines()]
        pairs = (line.partition(":") for line in lines if line)
        known = {name.strip(): reason.strip() for name, _, reason in pairs}
    unknown = known.keys() - {law.name for law in ALL}
    if unknown:
        raise ValueError(f"xfail names laws that do not exist: {sorted(unknown)}")
    return known


def try_law(
    law: Law,
    kernel: Kernel,
    max_examples: int,
    seed: int,
    known: str | None = None,
    *,
    shrink: bool = True,
) -> Outcome:
    """Try a law on drawn calls; `known` is the reason why it is expected to fail."""
    reason = law.not_promised(kernel)
    if reason is not None:
        status = "not promised" if known is None else "xpassed"
        return Outcome(law.name, law.promise, status, 0, 0.0, reason)
    start = time.perf_counter()
    trial = _Trial(law, kernel, shrink)
    examples = max(1, round(max_examples * law.share))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.run(examples, seed)
    seconds = time.perf_counter() - start
    if trial.failure is None:
        status = "held" if known is None else "xpassed"
        if trial.calls == 0:
            status, known = "not promised", "no call of this kind lies in the domain"
        return Outcome(law.name, law.promise, status, trial.calls, seconds, known or "")
    case, message = trial.failure
    failure = Failure(law.name, message, runnable(law, kernel, case), case)
    status = "failed" if known is None else "xfailed"
    return Outcome(law.name, law.promise, status, trial.calls, seconds, known or "", failure)


class _Trial:
    """One law on many calls; keeps the smallest call that broke it."""

    def __init__(self, law: Law, kernel: Kernel, shrink: bool) -> None:
        self.law, self.kernel, self.shrink = law, kernel, shrink
        self.failure: tuple[Case, str] | None = None
        self.calls = self.since_failure = 0
        self.deadline = float("inf")

    def run(self, examples: int, seed: int) -> None:
        phases = [Phase.generate, Phase.shrink] if self.shrink else [Phase.generate]
        test = hypothesis.given(self.law.cases(self.kernel))(self.attempt)
        test = hypothesis.settings(
            max_examples=examples,
            phases=phases,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
            derandomize=False,
        )(hypothesis.seed(seed)(test))
        try:
            test()
        except (_Broken, _Enough):
            pass
        except HypothesisException:
            # A failure that does not repeat is a failure; no call to try is none.
            if self.failure is None and self.calls > 0:
                raise

    def attempt(self, case: Case) -> None:
        self.calls += 1
        # Hypothesis seeds the global generators alike for every example; what a kernel draws from
        # them is its own affair and must show as the accident it is.
        random.seed()
        np.random.seed()  # noqa: NPY002
        message = verdict(self.law, self.kernel, case)
        if self.failure is not None:
            self.since_failure += 1
        if message is not None:
            if self.failure is None:
                self.deadline = time.perf_counter() + _SHRINK_SECONDS
            self.failure = (case, message)
        if self.failure is not None and (
            not self.shrink
            or self.since_failure >= _SHRINK_CALLS
            or time.perf_counter() > self.deadline
        ):
            raise _Enough
        if message is not None:
            raise _Broken(message)


def verdict(law: Law, kernel: Kernel, case: Case) -> str | None:
    """Return what a law has to say against a kernel on one call, or None."""
    try:
        law.check(kernel, case)
    except OutsideDomain:
        return None
    except AssertionError as wrong:
        return str(wrong) or "an assertion without a message failed"
    except Exception as error:  # the kernel may raise anything
        return f"the call raised {type(error).__name__}: {error}"
    return None
