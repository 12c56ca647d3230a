"""pytest plugin: options for the classes that `make_suite` returns.

Load it with ``pytest_plugins = ["fusedattn.testing.plugin"]`` in a ``conftest.py``, or with
``pytest -p fusedattn.testing.plugin``.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--attention-examples`` and ``--attention-seed``."""
    group = parser.getgroup("attention", "laws of attention")
    group.addoption("--attention-examples", type=int, help="calls drawn for each law (100)")
    group.addoption("--attention-seed", type=int, help="seed of all draws")
