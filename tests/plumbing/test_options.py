import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from plumbing import options
from plumbing.machine import start_processes
from plumbing.options import (
    BadInput,
    checked,
    is_kind,
    parse_json,
    place,
    read_json,
    read_tensors,
    remove_leftovers_of,
    write_json,
    write_whole,
)
from plumbing.run_folder import append_rows, cut_back

ROOT = Path(__file__).parents[2]
WAITING = """
import signal
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from plumbing.options import run_script

def main():
    pool = ThreadPoolExecutor(1)
    pool.submit(time.sleep, 60)
    print("waiting", flush=True)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from birth
run_script(main)
"""


def test_ctrl_c_ends_at_once_in_one_line_even_if_a_thread_still_waits():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "waiting\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 10  # s, of the thread's 60
    assert process.returncode == 130 and said == "stopped by Ctrl-C\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (options.BadInput("--lr x: no number"), 2, "error: --lr x: no number\n"),
        (OSError(28, "No space left on device", "a.json"), 2, "make room or choose another folder"),
        (RuntimeError("[gloo/pair.cc:553] Connection closed by peer"), 2, "another process of this run has"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(capsys, error, status, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        options.run_script(main)
    told = capsys.readouterr().err
    assert ended.value.code == status and said in told and told.count("\n") == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    options.write_json(str(path), {"old": 1})

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(options.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        options.write_json(str(path), {"new": 2})
    assert path.read_text() == '{\n "old": 1\n}' and list(tmp_path.iterdir()) == [path]


def test_a_number_that_is_none_is_written_as_null_so_that_what_a_run_wrote_can_be_read_again(tmp_path):
    row = {"step": 0, "rms": math.nan, "advantages": [1.0, -math.inf], "of": {"ci95": (math.inf, 2)}}
    wanted = {"step": 0, "rms": None, "advantages": [1.0, None], "of": {"ci95": [None, 2]}}
    append_rows(str(tmp_path / "metrics.jsonl"), [row])
    assert cut_back(str(tmp_path / "metrics.jsonl"), {"step": int}) == [wanted]
    write_json(str(tmp_path / "results.json"), row)
    assert read_json(str(tmp_path / "results.json"), "") == wanted


def test_what_killed_processes_left_of_a_file_or_folder_goes_as_it_is_written_anew(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, path = f"{ended.pid}.{place()}0123abcd.tmp", str(tmp_path / "out.json")
    foreign = f"out.json.{ended.pid}.{'0' * 16}.tmp"  # of another machine or container: not known to be dead
    kept = [
        f"out.json.{os.getpid()}.{place()}0123abcd.tmp",
        f"other.json.{dead}",
        "out.json.bak",
        f"out_json.{dead}",
        foreign,
    ]
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / f"out.json.{dead}").write_bytes(b"half")
    (tmp_path / f"out.json.{10**30}.{place()}0123abcd.tmp").write_bytes(b"half")
    write_whole(path, b"whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["out.json", *kept])
    os.utime(tmp_path / foreign, (0, 0))
    options.left_in.cache_clear()
    write_whole(path, b"anew")
    assert not (tmp_path / foreign).exists()
    runs = tmp_path / "runs"
    (runs / f"run.{dead}").mkdir(parents=True)
    (runs / f"run.{dead}" / "config.json").write_bytes(b"{}")
    remove_leftovers_of(str(runs / "run"))
    assert not os.listdir(runs)
    looks, real = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: looks.append(folder) or real(folder))
    for i in range(9):
        write_whole(str(runs / f"clip{i}.mp4"), b"whole")
    assert not looks  # once a process is enough: a folder of thousands of clips is not listed for each


def test_help_tells_what_each_option_means_and_its_default(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", train)  # whose docstring --help begins with
    done = script(train.main, "train.py", "--help")
    told = " ".join(done.stdout.split())
    assert done.returncode == 0 and "fine-tune a video-language policy" in told
    assert "--clip_eps X (0.2)" in told and "G: completions a prompt, ordered by the oracle (5)" in told
    assert "7b: the paper's" in told and "the rivals on the same rollouts ('grpo_rank')" in told


def test_an_empty_text_on_the_command_line_is_a_variable_that_is_not_set_and_never_a_default(script):
    for name in ("--adapter", "--data", "--out"):
        done = script(train.main, "train.py", name, "")
        assert done.returncode == 2 and f"argument {name}: it is empty; name something" in done.stderr


def test_an_option_that_is_true_or_false_refuses_other_words(script):
    for words in ("--resume", "maybe"), ("--resume=",), ("--oracle_gold", "yes"):
        done = script(train.main, "train.py", *words)
        assert done.returncode == 2 and f"argument {words[0].rstrip('=')}: '" in done.stderr
        assert "is neither true nor false" in done.stderr


def test_a_text_with_a_zero_byte_is_no_text():
    with pytest.raises(BadInput, match="--out"):
        checked("out", str, "runs/\0")


def test_an_object_is_of_a_kind_if_each_named_field_is_and_true_is_no_number():
    kinds = {"step": int, "rows": list[int | float], "of": {"name": str}}
    sound = {"step": 1, "rows": [1, 0.5], "of": {"name": "a"}, "more": None}
    assert is_kind(sound, kinds)
    for damage in ({"step": True}, {"step": 1.0}, {"rows": ["1"]}, {"rows": None}, {"of": {}}, {"of": []}):
        assert not is_kind(sound | damage, kinds)
    assert not any(is_kind(value, kinds) for value in (None, [], "step", {"step": 1}))


def test_a_name_twice_in_one_object_is_refused():
    """The last one would win, silently."""
    assert parse_json('{"a": {"b": 1}, "b": [{"a": 1}, {"a": 2}]}', "x", "mend it")["a"] == {"b": 1}
    with pytest.raises(BadInput, match="x: not JSON .'b' stands there twice.; mend it"):
        parse_json('{"a": [{"b": 1, "c": 2, "b": 1}]}', "x", "mend it")


def test_an_error_of_the_disk_names_the_file():
    for write in (lambda: append_rows("/dev/full", [{}]), lambda: write_whole("/dev/full", b"x")):
        with pytest.raises(OSError, match="/dev/full"):
            write()


def test_a_link_leads_to_its_file_and_a_device_stays_one(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("before")
    link.symlink_to(file)
    write_whole(str(link), b"after")
    assert link.is_symlink() and file.read_text() == "after"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(str(pipe), b"to a reader")
    assert os.read(reader, 99) == b"to a reader" and pipe.is_fifo()
    os.close(reader)


def test_where_memory_ends_there_is_one_line(script):
    import torch

    for size in (10**15, 2**62):
        done = script(lambda size=size: torch.empty(size), "x.py")
        assert done.returncode == 2 and done.stderr.startswith("error: not enough memory (")
        assert done.stderr.count("\n") == 1 and "--micro_batch_prompts" in done.stderr
    with pytest.raises(RuntimeError):
        script(lambda: torch.ones(2) @ torch.ones(3), "x.py")


def test_a_reader_that_closes_standard_output_does_not_end_the_script(tmp_path):
    """As in `python train.py | head`: it goes on, and ends with status 0."""
    code = f"""
import time
from plumbing.options import run_script

def main():
    for i in range(2000):
        print("line", i, flush=True)
    open({str(tmp_path / "ended")!r}, "w").close()

run_script(main)
"""
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and (tmp_path / "ended").exists()
    assert process.stderr.read() == b""


def test_a_script_without_standard_output_runs():
    done = subprocess.run(["sh", "-c", f"{sys.executable} eval.py compare no_run >&-"], cwd=ROOT, stderr=-1)
    assert done.returncode == 2 and done.stderr.startswith(b"error: no_run/"), done.stderr


TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    "given", [{"RANK": "2", "MASTER_PORT": "29500"}, {"RANK": "0", "MASTER_PORT": "99999"}]
)
def test_a_process_or_a_port_that_cannot_be_is_named(monkeypatch, given):
    for name, value in (TORCHRUN | given).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="no such process or port"):
        start_processes("cpu")


@pytest.mark.parametrize(
    "given", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "4", "RANK": "0"}]
)
def test_a_world_size_that_torchrun_did_not_set_is_named(monkeypatch, given):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="WORLD_SIZE=.*; unset it, or start with torchrun"):
        start_processes("cpu")


def test_tensors_that_this_torch_cannot_read_as_numbers_are_refused_by_name_of_the_file(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(BadInput, match="x.safetensors: .*; use a sound copy"):
        read_tensors(str(tmp_path / "x.safetensors"), "use a sound copy")
