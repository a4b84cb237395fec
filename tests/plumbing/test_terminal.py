"""What a run writes into a terminal."""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file
from test_train import ROOT, adapter, command

from plumbing.progress import Bar


def cpu_seconds(pid: int) -> float:
    """Of a process, without its children; a busy machine does not change them as it changes the clock."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")


def in_terminal(command, columns=80) -> tuple[list[str], tuple[float, bytes]]:
    """What a command writes into a terminal of that width, as the lines and the states of its bars; and the
    longest time for which it writes nothing, in CPU seconds, with what it wrote before."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        os.execv(sys.executable, [sys.executable, *command])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    told, times = b"", [(0.0, b"")]
    with suppress(OSError):  # which is how the end of a terminal reads
        while part := os.read(terminal, 65536):
            told += part
            times.append((cpu_seconds(pid), part[-80:]))
    os.waitpid(pid, 0)
    silence = max((after[0] - before[0], before[1]) for before, after in pairwise(times))
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.decode())), silence


def test_a_file_gets_a_line_for_each_tenth_of_the_steps(capsys):
    bar, numbers = Bar(40, 20, True), {"accuracy": 0.5, "kl": None, "dead_groups": 1, "failed_groups": 0}
    for step in range(20, 40):
        bar.show(step, numbers)
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"step {n}/40 acc 50.0% dead 1 failed 0" for n in (24, 28, 32, 36, 40)]
    assert told.err == ""


def test_a_run_fits_80_columns_looks_at_itself_and_keeps_its_best_adapter_answers_and_report(
    tmp_path_factory,
):
    """At this rate the policy falls apart, so that the best adapter is not the last one."""
    home = tmp_path_factory.mktemp("short")  # the path of the report is printed, and not cut
    options = ["--num_steps", "2", "--lr", "0.1", "--eval_every", "1", "--eval_subset", "4", "--keep", "best"]
    lines, silence = in_terminal(command(home, "seen", *options))
    assert max(map(len, lines)) <= 80 and silence[0] < 3, (silence, max(lines, key=len))
    assert any(line.startswith("step 2/2, acc") for line in lines) and any(
        "update [" in line for line in lines
    )
    assert any(line.split("  ")[0] == "Temporal Grounding" for line in lines)  # the table is not cut
    out, results = home / "seen", json.loads((home / "seen" / "results.json").read_text())
    looks = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["greedy"]["n"]) for row in looks] == [(0, 4), (1, 4), (2, 4)]
    shares = [row["greedy"]["accuracy"] for row in looks]
    best = shares.index(max(shares))
    assert results["kept"] == {"step": best, "accuracy": shares[best]} and best < 2
    assert load_file(out / "best" / "adapter_model.safetensors").keys() == adapter(home, "seen").keys()
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    after = [row for row in answers if row["step"] == best]
    assert len(after) == results["after"]["greedy"]["n"]
    assert sum(row["right"] for row in after) / len(after) == results["after"]["greedy"]["accuracy"]
    assert (out / "report.html").stat().st_size < 2e6 and len(list((out / "frames").iterdir())) >= 2
