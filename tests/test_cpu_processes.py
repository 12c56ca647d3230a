"""Forks, other processes and the end of the interpreter: nothing hangs, crashes or complains."""

import os

import pytest
from cpu_backend import python

BEGIN = """
import os, signal, sys, threading, time, warnings
import numpy as np
import fusedattn
warnings.simplefilter("ignore", DeprecationWarning)  # fork() in a process with threads
fusedattn.set_num_threads(2)
rng = np.random.default_rng(0)
large = [rng.standard_normal((1, 4, 1100, 64), np.float32) for _ in range(3)]
medium = [x[:, :2, :300] for x in large]

def answer():
    results = [fusedattn.attention(*x, causal=True) for x in (large, medium)]
    return b"".join(x.tobytes() for x in results)

def child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(100)  # a deadlock ends here
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@fork
def test_a_child_computes_after_the_parent_has():
    code = f"""{BEGIN}
before = answer()
print([child(lambda: answer() == before) for _ in range(3)], answer() == before)
print(child(lambda: answer() == before and child(lambda: answer() == before) == 0))
"""
    assert python(code) == "[0, 0, 0] True\n0\n"


@fork
def test_a_child_computes_before_the_parent_has():
    code = f"""{BEGIN}
print(child(lambda: len(answer()) > 0), len(answer()) > 0)
"""
    assert python(code) == "0 True\n"


@fork
def test_a_fork_amid_calls_of_other_threads():
    code = f"""{BEGIN}
before, stop = answer(), []
def call():
    while not stop:
        assert answer() == before
callers = [threading.Thread(target=call) for _ in range(3)]
for caller in callers: caller.start()
print(sum(child(lambda: answer() == before) for _ in range(20)))
stop.append(True)
for caller in callers: caller.join()
print(answer() == before)
"""
    assert python(code) == "0\nTrue\n"


@fork
def test_a_pool_of_forked_processes():
    code = f"""{BEGIN}
import multiprocessing
def call(i): return answer()
if __name__ == "__main__":
    before = answer()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        print(all(x == before for x in pool.map(call, range(6))))
"""
    assert python(code) == "True\n"


ENDS = {
    "right after a call": "answer()",
    "without joining the pool": "answer(); sys.exit(0)",
    "amid calls of daemon threads": """
def call():
    while True: answer()
for _ in range(3): threading.Thread(target=call, daemon=True).start()
time.sleep(0.3)""",
    "before a thread's calls": """
def call():
    time.sleep(0.2)
    for _ in range(3): answer()
    print(len(answer()) > 0)
threading.Thread(target=call).start()""",
    "with calls at exit": """
import atexit
before = answer()
atexit.register(lambda: print(answer() == before))""",
    "with a first call at exit": """
import atexit
atexit.register(lambda: print(len(answer()) > 0))""",
    "amid the compilation by a daemon thread": """
threading.Thread(target=answer, daemon=True).start()
time.sleep(0.2)""",
}
PRINTS = {"before a thread's calls", "with calls at exit", "with a first call at exit"}


@pytest.mark.parametrize("name", ENDS)
def test_the_interpreter_ends(name):
    assert python(BEGIN + ENDS[name]) == ("True\n" if name in PRINTS else "")


@fork
def test_ctrl_c_ends_a_script():
    """A real SIGINT, to a real process in the midst of a long call."""
    code = f"""{BEGIN}
long = [np.broadcast_to(rng.standard_normal((1, 30_000, 64), np.float32), (8, 30_000, 64))] * 3
fusedattn.attention(*medium)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
begun = time.perf_counter()
try:
    fusedattn.attention(*long)
except KeyboardInterrupt:
    print(time.perf_counter() - begun < 0.7)
"""
    assert python(code) == "True\n"
