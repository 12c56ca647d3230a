"""A pytest class with one test a law."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import settings

from fusedattn.testing.check import read_xfail, select_laws, try_law
from fusedattn.testing.kernel import Kernel, as_dtypes, as_supports
from fusedattn.testing.laws import Law


def make_suite(
    fn: Callable[..., Any],
    *,
    supports: Iterable[str] = (),
    dtypes: Iterable[str] = ("float32",),
    max_examples: int | None = None,
    seed: int | None = None,
    laws: Iterable[str] | None = None,
    xfail: Any = None,
    **options: Any,
) -> type:
    """Return a test class that holds a function to each law it promises.

    Parameters
    ----------
    fn, supports, dtypes, laws, xfail
        As for `check_attention`. A law in `xfail` is a strict xfail: its test fails when it holds.
    max_examples : int, optional
        Calls drawn for a law; by default ``--attention-examples`` of the plugin, or 100.
    seed : int, optional
        Seed of all draws; by default ``--attention-seed``, or 0 under a derandomised Hypothesis
        profile, or a new one.
    **options
        The other arguments of `check_attention`.

    Returns
    -------
    type
        Assign it to a name that begins with ``Test`` in a test module.

    Raises
    ------
    TypeError, ValueError
        As `check_attention`.

    Examples
    --------
    >>> def attention(q, k, v): ...
    >>> TestAttention = make_suite(attention)
    >>> hasattr(TestAttention, "test_law")
    True
    """
    kernel = Kernel(fn, supports=as_supports(supports), dtypes=as_dtypes(dtypes), **options)
    known = read_xfail(xfail)
    cases = []
    for law in select_laws(laws):
        if law.not_promised(kernel) is None:
            reason = known.get(law.name)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
            cases.append(pytest.param(law, id=law.name, marks=marks))

    class Suite:
        @pytest.mark.parametrize("law", cases)
        def test_law(self, law: Law, request: pytest.FixtureRequest) -> None:
            option = request.config.getoption
            examples = max_examples or option("--attention-examples", None) or 100
            start = option("--attention-seed", None) if seed is None else seed
            if start is None:
                start = 0 if settings().derandomize else random.SystemRandom().randrange(2**32)
            outcome = try_law(law, kernel, examples, start)
            failure = outcome.failure
            if failure is not None:
                pytest.fail(f"{failure.message}\n\n{failure.code}\nseed {start}", pytrace=False)

    return Suite
