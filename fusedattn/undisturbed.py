"""Work that no signal may break off in the midst."""

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

# A fork waits so many seconds at most.
PATIENCE = 30.0

_lock = threading.RLock()
_held: list[bool] = []


@functools.cache
def _guard_forks() -> None:
    """Let a fork wait for this work: the child would have half of it, and locks nobody opens.

    Of all such hooks the last one registered comes first. That of `logging` takes a lock that
    imports need, so it must not come before this one.
    """
    import logging  # noqa: F401

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lambda: _held.append(_lock.acquire(timeout=PATIENCE)),
            after_in_parent=_after_fork,
            after_in_child=_after_fork,
        )


def _after_fork() -> None:
    if _held.pop():
        _lock.release()


def undisturbed(
    function: Callable[Parameters, Returned],
    *arguments: Parameters.args,
    **keywords: Parameters.kwargs,
) -> Returned:
    """Call a function where no signal handler runs, one at a time; a fork waits for it.

    For imports and compilers. Ctrl-C in the midst of them may be swallowed by a callback, or leave
    a package half imported and a registry half filled for good. Signal handlers run on the main
    thread, which here only waits for another one, and leaves at once when it is interrupted. What
    was begun is finished behind its back: what the function does must be of use to a later call.

    Raises
    ------
    BaseException
        What the function raises.

    Examples
    --------
    >>> undisturbed(divmod, 17, 5)
    (3, 2)
    """
    _guard_forks()
    if threading.current_thread() is not threading.main_thread():
        with _lock:
            return function(*arguments, **keywords)
    results: list[Returned] = []
    errors: list[BaseException] = []
    finished = threading.Event()

    def run() -> None:
        try:
            with _lock:
                results.append(function(*arguments, **keywords))
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    try:
        threading.Thread(target=run, name="fusedattn-undisturbed").start()
    except RuntimeError:  # no more threads
        run()
    while not finished.wait(0.1):  # on Windows, signals are heard only between two waits
        pass
    if errors:
        raise errors[0]
    return results[0]
