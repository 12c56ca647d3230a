"""Compiled code on disk: a gain when it is whole and ours, no harm when it is not."""

import os
import shutil
import stat
import sys
import time
from pathlib import Path

import llvmlite
import numba
import pytest
from cpu_backend import finish, process, python

import fusedattn
from fusedattn import kernel_files
from fusedattn.cpu import cache, tile

CALL = """
import sys
import numpy as np
import fusedattn
q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 60, 32), np.float32)
out = fusedattn.attention(q, k, v, causal=True)
expected = fusedattn.attention(q, k, v, causal=True, backend="reference")
assert np.abs(out - expected).max() < 1e-5
print(out.tobytes().hex()[:40])
"""


@pytest.fixture(scope="module")
def filled_at_once(tmp_path_factory):
    """A folder as two first calls at once leave it, and what they returned."""
    folder = tmp_path_factory.mktemp("cache") / "made" / "on demand"
    children = [process(CALL, FUSEDATTN_CACHE_DIR=folder) for _ in range(2)]
    return folder, [finish(child) for child in children]


@pytest.fixture(scope="module")
def filled(filled_at_once):
    """A folder as a first call leaves it, and what the call returned."""
    folder, (returned, _) = filled_at_once
    return folder, returned


@pytest.fixture
def folder(filled, tmp_path):
    """A copy of it."""
    copy = tmp_path / "copy"
    shutil.copytree(filled[0], copy)
    return copy


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_process_compiles_nothing(filled, folder):
    before = contents(folder)
    assert "worker" in {name.split("-")[0] for name in before}
    assert len(before) > 1
    compiles = CALL.replace(
        "import fusedattn\n", "import fusedattn, fusedattn.cpu.compile as c\n", 1
    )
    compiles = compiles.replace("out =", "c.compile_micro = c.emit_program = None\nout =")
    assert python(compiles, FUSEDATTN_CACHE_DIR=folder) == filled[1]
    assert contents(folder) == before


def test_a_process_that_finds_its_kernels_loads_no_compiler(folder):
    code = """
import sys
import numpy as np
import fusedattn

x = np.ones((1, 40, 8), np.float32)
x[0, 3] = np.nan  # the rescue too
out, lse = fusedattn.attention(x, x, x, mask=np.ones((40, 40), bool), return_lse=True)
fusedattn.attention_backward(out, x, x, x, out, lse)
print("numba" in sys.modules)
"""
    loaded = [python(code, FUSEDATTN_CACHE_DIR=folder).strip() for _ in range(2)]
    assert loaded == ["True", "False"]


@pytest.mark.skipif(sys.platform == "win32", reason="other permissions")
def test_the_folder_and_its_files_are_the_users_own(filled):
    assert stat.S_IMODE(filled[0].stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in filled[0].iterdir()} == {0o600}
    assert not [path for path in filled[0].iterdir() if path.name.startswith(".")]


def damaged(payload):
    """Ways in which a file may not be what was written."""
    middle = len(payload) // 2
    flipped = bytes([payload[middle] ^ 1])
    return {
        "empty": b"",
        "one byte": payload[:1],
        "the digest alone": payload[:32],
        "cut": payload[:-1],
        "cut in half": payload[:middle],
        "a flipped bit": payload[:middle] + flipped + payload[middle + 1 :],
        "more at the end": payload + b"\0",
        "zeros": bytes(len(payload)),
        "text": b"not machine code at all" * 1000,
    }


def test_a_damaged_file_counts_as_absent(tmp_path):
    path = tmp_path / "kernel.bin"
    kernel_files.write(path, b"machine code" * 100)
    assert kernel_files.read(path) == b"machine code" * 100
    for name, payload in damaged(path.read_bytes()).items():
        path.write_bytes(payload)
        assert kernel_files.read(path) is None, name
    path.unlink()
    assert kernel_files.read(path) is None
    path.mkdir()
    assert kernel_files.read(path) is None


def test_damaged_files_are_compiled_and_written_again(filled, folder):
    before = contents(folder)
    ways = sorted(damaged(b"x" * 100))
    for i, (name, payload) in enumerate(before.items()):
        (folder / name).write_bytes(damaged(payload)[ways[i % len(ways)]])
    assert python(CALL, FUSEDATTN_CACHE_DIR=folder) == filled[1]
    for name in before:
        assert kernel_files.read(folder / name) is not None


def test_whole_files_of_another_kind_are_compiled_again(filled, folder):
    """A digest that fits a file does not make it fit to be loaded under another's name."""
    first, *others = sorted(folder.iterdir())
    payloads = {path: path.read_bytes() for path in (first, *others)}
    for path, stranger in zip((first, *others), (*others, first), strict=True):
        path.write_bytes(payloads[stranger])
        assert kernel_files.read(path) is None
    assert python(CALL, FUSEDATTN_CACHE_DIR=folder) == filled[1]
    assert all(kernel_files.read(path) for path in payloads)


NO_FOLDER = {
    "below a file": "/dev/null/fusedattn",
    "a file": "FILE",
    "too long": "/tmp/" + "x" * 5000,
}


@pytest.mark.parametrize("name", NO_FOLDER)
def test_where_nothing_can_be_written_nothing_is_missed(tmp_path, monkeypatch, name):
    (tmp_path / "FILE").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEDATTN_CACHE_DIR", NO_FOLDER[name])
    assert cache.fetch("kernel", "detail", lambda: b"code") == b"code"
    assert (tmp_path / "FILE").read_text() == "mine"


@pytest.mark.parametrize("call", ["tempfile.mkstemp", "os.replace", "os.fdopen"])
@pytest.mark.parametrize("error", [PermissionError, OSError(28, "No space left on device")])
def test_a_full_or_read_only_disk_is_not_missed(tmp_path, monkeypatch, call, error):
    def fail(*_args, **_keywords):
        raise error

    module, name = call.split(".")
    monkeypatch.setenv("FUSEDATTN_CACHE_DIR", str(tmp_path))
    opened = []
    if name == "fdopen":
        monkeypatch.setattr(
            kernel_files.tempfile, "mkstemp", keep(kernel_files.tempfile.mkstemp, opened)
        )
    monkeypatch.setattr(getattr(kernel_files, module), name, fail)
    assert cache.fetch("kernel", "detail", lambda: b"code") == b"code"
    assert not list(tmp_path.iterdir())
    for handle, _ in opened:
        os.close(handle)


def keep(function, results):
    def call(*args, **keywords):
        results.append(function(*args, **keywords))
        return results[-1]

    return call


def test_a_call_without_any_cache_works():
    python(CALL, FUSEDATTN_CACHE_DIR=os.devnull + "/none")


@pytest.mark.skipif(not hasattr(os, "chmod") or sys.platform == "win32", reason="other permissions")
def test_a_read_only_folder_serves_what_it_holds(filled, folder):
    before = contents(folder)
    folder.chmod(0o500)
    for path in folder.iterdir():
        path.chmod(0o400)
    try:
        assert python(CALL, FUSEDATTN_CACHE_DIR=folder) == filled[1]
        assert contents(folder) == before
    finally:
        folder.chmod(0o700)


def test_the_folder_follows_the_customs_of_the_system(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDATTN_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kernel_files.sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kernel_files.cache_dir() == tmp_path / ".cache" / "fusedattn"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert kernel_files.cache_dir() == Path("/somewhere/fusedattn")
    monkeypatch.setattr(kernel_files.sys, "platform", "darwin")
    assert kernel_files.cache_dir() == tmp_path / "Library" / "Caches" / "fusedattn"
    monkeypatch.setenv("FUSEDATTN_CACHE_DIR", "/chosen")
    assert kernel_files.cache_dir() == Path("/chosen")


def test_without_a_home_nothing_is_kept(monkeypatch):
    def homeless(_):
        raise RuntimeError("Could not determine home directory.")

    for name in ("FUSEDATTN_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache.fetch("kernel", "detail", lambda: b"code") == b"code"


def copy_of_the_package(tmp_path):
    package = tmp_path / "fusedattn"
    if not package.exists():
        shutil.copytree(Path(fusedattn.__file__).parent, package)
    return package


def test_the_key_sees_every_source_of_a_kernel(monkeypatch, tmp_path):
    """Numba's own cache would run stale code after an emitter in another file has changed."""
    package = copy_of_the_package(tmp_path)
    monkeypatch.setattr(cache, "__file__", str(package / "cpu" / "cache.py"))
    digest = cache._source_digest.__wrapped__
    before = digest()
    assert digest() == before
    sources = [*(package / "cpu").rglob("*.py"), package / "masks.py", package / "philox.py"]
    assert len(sources) > 10
    for path in sources:
        text = path.read_text()
        path.write_text(text + "# changed\n")
        assert digest() != before, path
        path.write_text(text)
    assert digest() == before
    (package / "cpu" / "another.py").write_text("")
    assert digest() != before


def test_the_key_sees_tile_processor_and_versions(monkeypatch):
    keys = {cache._key(tile.tile_for(*kind, isa=isa)) for kind in KINDS for isa in ISAS}
    assert len(keys) == len(KINDS) * len(ISAS)
    before = cache._key("")
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "")
            assert (cache._key("") != before) == (name != "NUMBA_CPU_NAME")  # the host's, too
            patch.setenv(name, "generic")
            assert cache._key("") != before, name
    for owner, name, value in (
        (sys, "version", "4.0"),
        (cache, "_versions", lambda: ("0.0", numba.__version__)),
        (cache, "_versions", lambda: (llvmlite.__version__, "0.0")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert cache._key("") != before, name
    assert cache._versions() == (numba.__version__, llvmlite.__version__)
    assert cache._key("") == before


KINDS = [("float32", "float32"), ("float16", "float16"), ("float16", "float32")]
ISAS = [tile.AVX512, tile.AVX2, tile.SIMD128]


def test_unreadable_sources_switch_the_cache_off(monkeypatch, tmp_path):
    """As in an archive, or where only bytecode was installed: nothing would tell versions apart."""
    monkeypatch.setenv("FUSEDATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "nowhere" / "cpu" / "cache.py"))
    monkeypatch.setattr(cache, "_source_digest", cache._source_digest.__wrapped__)
    assert cache.fetch("kernel", "detail", lambda: b"code") == b"code"
    assert not list(tmp_path.iterdir())


@pytest.mark.deep
def test_a_changed_emitter_is_not_served_stale_code(tmp_path, folder):
    package = copy_of_the_package(tmp_path)
    source = package / "cpu" / "micro" / "softmax.py"
    text = source.read_text()
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, fusedattn
assert fusedattn.__file__.startswith(sys.argv[1])
q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 60, 32), np.float32)
print(fusedattn.attention(q, k, v).tobytes().hex()[:40])
"""
    before = python(code, tmp_path, FUSEDATTN_CACHE_DIR=folder)
    source.write_text(text + "\nEXP2[32] = (1.0, 0.5, *EXP2[32][2:])\n")
    assert python(code, tmp_path, FUSEDATTN_CACHE_DIR=folder) != before
    source.write_text(text)
    assert python(code, tmp_path, FUSEDATTN_CACHE_DIR=folder) == before


@pytest.mark.parametrize("signal", ["SIGKILL", pytest.param("SIGINT", marks=pytest.mark.deep)])
@pytest.mark.skipif(sys.platform == "win32", reason="other signals")
def test_a_first_compilation_that_was_killed_is_done_again(filled, tmp_path, signal):
    import signal as signals

    began = CALL.replace("out =", "print('begun', flush=True)\nout =")
    child = process(began, FUSEDATTN_CACHE_DIR=tmp_path)
    assert child.stdout.readline() == "begun\n"
    time.sleep(1.0)
    child.send_signal(getattr(signals, signal))
    child.communicate(timeout=60)
    assert child.returncode != 0
    assert python(CALL, FUSEDATTN_CACHE_DIR=tmp_path) == filled[1]
    assert all(kernel_files.read(path) for path in tmp_path.glob("*.bin"))
    # One process alone writes what two at once did.
    assert {path.name for path in tmp_path.glob("*.bin")} == set(contents(filled[0]))


def test_processes_that_compile_at_once_agree(filled_at_once):
    folder, (one, other) = filled_at_once
    assert one == other
    assert all(kernel_files.read(path) for path in folder.iterdir())
