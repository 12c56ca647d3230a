"""What the CPU kernels hold in a process: machine code and threads."""

from collections.abc import Sequence

from numpy.typing import DTypeLike

from fusedattn import checks, dispatch


def warmup(*, dtypes: Sequence[DTypeLike] = ("float32",)) -> None:
    """Compile the CPU kernels now, so that the first call of `attention` does not have to.

    Compiled code is kept in a cache on disk; with a warm cache this takes well under a second.

    Parameters
    ----------
    dtypes : sequence of dtype
        Storage types to compile for.

    Raises
    ------
    TypeError
        If one is not float16, bfloat16, float32 or float64.

    Examples
    --------
    >>> import fusedattn
    >>> fusedattn.warmup(dtypes=["float32"])
    """
    if isinstance(dtypes, str) or not isinstance(dtypes, Sequence):
        raise TypeError(
            f"dtypes must be a sequence of {checks.FLOAT_NAMES}, but is {checks.describe(dtypes)}"
        )
    wanted = [checks.storage_dtype("dtypes", dtype) for dtype in dtypes]
    dispatch.load("cpu")
    from fusedattn.cpu import backend

    backend.warmup([dtype.name for dtype in wanted])


def set_num_threads(n: int) -> None:
    """Set how many threads the CPU kernels use; the results do not depend on it.

    The default is what the process may use (affinity and container quota), or the environment
    variable ``FUSEDATTN_NUM_THREADS``.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError, ValueError
        If n is not such an int.

    Examples
    --------
    >>> import fusedattn
    >>> before = fusedattn.get_num_threads()
    >>> fusedattn.set_num_threads(1)
    >>> fusedattn.get_num_threads()
    1
    >>> fusedattn.set_num_threads(before)
    """
    from fusedattn.cpu import threads

    threads.set_num_threads(checks.integer("n", n, 1, threads.MOST_THREADS))


def get_num_threads() -> int:
    """Return how many threads the CPU kernels use: an int, at least 1; see `set_num_threads`."""
    from fusedattn.cpu import threads

    count: int = threads.get_num_threads()
    return count
