"""Work that no signal may break off in the midst."""

import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def undisturbed(
    function: Callable[Parameters, Returned],
    *arguments: Parameters.args,
    **keywords: Parameters.kwargs,
) -> Returned:
    """Call a function where no signal handler runs: on a thread of its own.

    For imports and compilers. Ctrl-C in the midst of them may be swallowed by a callback, or leave
    a package half imported and a registry half filled for good. Here the main thread only waits and
    leaves at once when it is interrupted; what was begun is finished behind its back, so what the
    function does must be of use to a later call.

    Raises
    ------
    BaseException
        What the function raises.

    Examples
    --------
    >>> undisturbed(divmod, 17, 5)
    (3, 2)
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments, **keywords)  # signal handlers run on the main thread alone
    results: list[Returned] = []
    errors: list[BaseException] = []
    finished = threading.Event()

    def run() -> None:
        try:
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
