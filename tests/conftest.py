import io
import os
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

TESTS = Path(__file__).parent
if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch is imported: as many threads as `-n` says, not twice
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# The repository's own modules, and the test files of the other folders, whose helpers some tests share
sys.path[:0] = [str(TESTS.parent), *(str(folder) for folder in TESTS.iterdir() if folder.is_dir())]


@contextmanager
def signals_kept():
    """A run catches signals for the life of its process; here the process goes on with the next test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def signals_are_put_back():
    with signals_kept():
        yield


@contextmanager
def one_thread():
    """Small runs are fastest so, and a run in a process of its own with one thread has the same numbers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def script():
    """script(main, name, *arguments) runs a script in this process: seconds faster than one of its own."""
    from plumbing.options import run_script

    def run(main, *argv):
        out, err = io.StringIO(), io.StringIO()
        argv = mock.patch.object(sys, "argv", [*map(str, argv)])
        with argv, signals_kept(), one_thread(), redirect_stdout(out), redirect_stderr(err):
            with pytest.raises(SystemExit) as ended:
                run_script(main)
        return SimpleNamespace(returncode=ended.value.code, stdout=out.getvalue(), stderr=err.getvalue())

    return run
