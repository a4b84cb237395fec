import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = Path(__file__).parent
# The repository's own modules, and the test files of the other folders, whose helpers some tests share
sys.path[:0] = [str(TESTS.parent), *(str(folder) for folder in TESTS.iterdir() if folder.is_dir())]


@pytest.fixture(autouse=True)
def signals_are_put_back():
    """A run catches signals for the life of its process; here the process goes on with the next test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def script(monkeypatch, capsys):
    """script(main, name, *arguments) runs a script in this process: seconds faster than one of its own."""
    from plumbing.options import run_script

    def run(main, *argv):
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        told = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=told.out, stderr=told.err)

    return run
