"""A run folder and the life of a run: its steps, clock, reports and checkpoints, and how it ends early.

    config.json             the options, what `auto` became, and what the run was made with and from
    sessions.log            when and with which command it was started and resumed
    metrics.jsonl           a row a step; rollouts.jsonl: two prompts of each step with their candidates
    answers.jsonl           the answers to held-out questions of every evaluation, by step: 0 is the start
    evaluations.jsonl       accuracies while it ran (--eval_every); best/: the best adapter of these
    frames/                 pictures of the videos that report.html shows
    checkpoint.safetensors  all that --resume needs, replaced in one rename
    adapter/                the adapter in PEFT's files, rewritten from the checkpoint by a resume
    results.json            the tables before and after; report.html: all of it as one page

Files are replaced whole or only ever appended to; a resume cuts what was appended back to the checkpoint.
Process 0 writes.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch

from plumbing.machine import environment, process_info, reduce_sum
from plumbing.options import (
    BadInput,
    Count,
    CountOrNone,
    EndedEarly,
    Options,
    becoming,
    checked,
    is_kind,
    json_lines,
    naming,
    parse_json,
    read_from,
    read_json,
    remove_leftovers,
    write_json,
    write_whole,
)  # fmt: skip

# With --resume these may be given anew: they say nothing about the update
MAY_CHANGE = {"resume", "out", "num_steps", "oracle_url", "oracle_concurrency", "oracle_timeout"}
MAY_CHANGE |= {"oracle_patience", "oracle_max_calls", "oracle_max_tokens", "stop_after", "tensorboard"}
OR_EARLIER = " (or an earlier version of this code, which compared less of a file, made it)"
LOGS = {"metrics": -1, "rollouts": -1, "answers": 0, "evaluations": 0}  # their last row is of step + this
CHECKPOINT = "checkpoint.safetensors"
COPY_AGAIN = "the run's own file is needed; start the run anew in another --out"


@dataclass
class RunOptions(Options):
    """The run folder: where a run lies, and when it is saved"""

    out: str = "runs/default"  # run folder; it must not exist, unless --resume
    resume: bool = False  # continue the run in --out from its last checkpoint
    save_every: Count = 20  # steps between checkpoints
    max_bad_steps: Count = 3  # non-finite losses in a row before the run stops
    eval_every: CountOrNone = 0  # steps between evaluations while it runs; 0: only before and after
    eval_subset: CountOrNone = 200  # held-out questions of such an evaluation, drawn once; 0: all
    keep: Literal["last", "best"] = "last"  # whose adapter the run ends with; best: of --eval_every's
    stop_after: CountOrNone = 0  # evaluations in a row without a better one that end the run; 0: none do
    tensorboard: bool = False  # write the numbers of metrics.jsonl for TensorBoard, too

    def __post_init__(self):
        super().__post_init__()
        self.out = os.path.normpath(self.out) if self.out.strip() else self.out
        if not self.eval_every and (self.keep == "best" or self.stop_after):
            option = "--keep best" if self.keep == "best" else "--stop_after"
            raise BadInput(f"{option}: the best of which evaluations? give --eval_every N too")
        if self.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise BadInput("--tensorboard: the package is missing; pip install tensorboard")


def stored_options(given: dict, config_class) -> dict:
    """With --resume: the run's own options. Those given again must be the same, but for MAY_CHANGE."""
    if not given.get("resume"):
        return {}
    out = given.get("out", config_class.out)
    path = os.path.join(out, "config.json")
    if not os.path.exists(path):
        raise BadInput(f"{path}: no such file, so --resume has nothing to continue; leave --resume out")
    stored = read_json(path, COPY_AGAIN)
    if "made" not in stored:
        raise BadInput(f"{path}: a run of an earlier version, which this one cannot continue; start it anew")
    del stored["made"]
    kinds = {field.name: field.type for field in fields(config_class)}
    if stored.keys() != kinds.keys():
        name = min(stored.keys() ^ kinds.keys())
        raise BadInput(f"{path}: option {name!r} is of another version of this code; start the run anew")
    with read_from(path):
        for name, kind in kinds.items():
            checked(name, kind, stored[name])
    for name, value in given.items():
        if name not in MAY_CHANGE and stored[name] != value:
            remedy = "leave it out to resume, or start anew in another --out"
            raise BadInput(f"--{name} {value}: the run in {out} has {stored[name]!r}; {remedy}")
    if stored.get("oracle") == "llm" and "oracle_url" not in given and os.environ.get("ORACLE_API_KEY"):
        raise BadInput(
            f"--oracle_url: only {path} names {stored['oracle_url']}; give the address again, so that"
            " ORACLE_API_KEY may be sent there, or unset the key"
        )
    return stored | {"out": out, "resume": True}


def check_folder(options: RunOptions) -> None:
    """Raises BadInput if --out cannot be begun: it holds a run that has a checkpoint, or other things."""
    out = options.out
    if not out.strip() or os.path.lexists(out) and not os.path.isdir(out):
        raise BadInput(f"--out {out!r}: no folder; name one that holds a run, or that does not exist yet")
    if options.resume or not os.path.exists(out):
        return
    if os.path.exists(os.path.join(out, CHECKPOINT)):
        raise BadInput(f"--out {out}: exists already; add --resume to continue it, or name another")
    config = os.path.join(out, "config.json")  # models have one too, but were not made with options
    holds_run = os.path.exists(config) and "made" in read_json(config, COPY_AGAIN)
    if set(os.listdir(out)) - {"lock"} and not holds_run:
        raise BadInput(f"--out {out}: exists already and holds no run; name another folder")


def fingerprint(*paths: str, whole: int = 2**26, block: int = 2**20) -> str:
    """SHA-256 over names, sizes and content of files, of a folder's files in their order. Of a file of more
    than `whole` bytes: 64 blocks of `block` bytes, evenly spread, from its start to its end."""
    digest = hashlib.sha256()
    for path in filter(None, paths):
        is_folder = os.path.isdir(path)
        files = [os.path.join(path, name) for name in sorted(os.listdir(path))] if is_folder else [path]
        for name in filter(os.path.isfile, files):
            size = os.path.getsize(name)
            digest.update(f"{os.path.basename(name)} {size}".encode())
            with open(name, "rb") as file:
                if size <= whole:
                    digest.update(file.read())
                    continue
                for i in range(64):
                    file.seek(i * (size - block) // 63)
                    digest.update(file.read(block))
    return digest.hexdigest()


def cut_back(path: str, kinds: dict[str, type], kept=lambda row: True) -> list[dict]:
    """Takes out of a JSONL file the rows that are not `kept`, and a last row cut in half by a kill. Returns
    the rest. kinds: what fields each row has, and of which type."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    rows = [parse_json(line, f"{path}, line {i}", COPY_AGAIN) for i, line in enumerate(lines, start=1)]
    for i, row in enumerate(rows, start=1):
        if not is_kind(row, kinds):
            raise BadInput(f"{path}, line {i}: no row with {', '.join(kinds)}; {COPY_AGAIN}")
    write_whole(path, b"".join(line for line, row in zip(lines, rows, strict=True) if kept(row)))
    return [row for row in rows if kept(row)]


def locked(path: str, refusal: str):
    """The file, open to append and kept to this process until it is closed. BadInput: another has it."""
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise BadInput(f"{refusal}; wait for it to end") from error
    return file


class Kept:
    """The results of a long job, a row a question, in a JSONL file: a job that was killed goes on from it.
    of: rows by their id. kinds: the types of a row's fields. settings: all that decides the rows. same:
    fields that all of the job's rows share. then: called after each batch of rows, if there is one."""

    def __init__(self, path: str, kinds: dict[str, type], writes=True, settings=None, then=None, **same):
        self.path, self.writes, self.then, self.same = path, writes, then, same
        if os.path.isdir(path):
            raise BadInput(f"{path}: a folder; name a file")
        is_file = os.path.isfile(path) or not os.path.lexists(path)  # a device holds nothing to go on from
        if settings and is_file:
            self.hold(json.dumps(settings))
        rows = cut_back(path, {"id": str} | kinds) if writes and is_file else []
        self.of = {row["id"]: row for row in rows if same.items() <= row.items()}

    def hold(self, settings: str):
        """Keeps the file to this process, and to these settings: they stand beside it, in a file that is
        locked for the life of this object. BadInput: another process has it, or its rows are of others."""
        beside = f"{self.path}.settings"
        known = os.path.exists(beside)
        self.beside = locked(beside, f"{self.path}: another process is writing it")
        self.beside.seek(0)
        if self.beside.read() == settings:
            return
        if os.path.exists(self.path) and os.path.getsize(self.path):
            if not known:
                os.remove(beside)
            raise BadInput(f"{self.path}: made of other files or options; name another, or remove it first")
        self.beside.truncate(0)
        self.beside.write(settings)
        self.beside.flush()

    def add(self, rows: list[dict]):
        self.of |= {row["id"]: row for row in rows}
        if self.writes:
            append_rows(self.path, [self.same | row for row in rows])
        if self.then:
            self.then()


def append_rows(path: str, rows: list[dict]):
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json_lines(rows))


class RunFolder:
    """The folder of a run under way, locked for the life of the process.

    options: RunOptions, and all else that config.json keeps. learner: what learns, an object with `tensors()`
    and `restore(tensors)`. save_adapter(folder) writes its adapter for other programs. made_from:
    fingerprints of all that the run depends on; a resume on something else is refused.
    """

    def __init__(self, options, learner, save_adapter, device: torch.device, made_from: dict[str, str]):
        from plumbing.resume import made_before

        self.options, self.learner, self.save_adapter = options, learner, save_adapter
        self.device, self.out = device, options.out
        self.writes = process_info()[0] == 0
        self.step, self.progress, self.seconds = 0, {"bad_steps": 0, "bad_in_a_row": 0}, {}
        self.saved_step = 0
        self.began, self.signals = time.monotonic(), []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.catch)
        config = asdict(options) | {"resume": False, "made": environment() | {"from": made_from}}
        if self.writes:
            self.open(config)
        if options.resume:
            config["made"] = made_before(self.out, config["made"])
            if os.path.exists(os.path.join(self.out, CHECKPOINT)):
                self.load()
            if self.step > options.num_steps:
                words = f"the run has taken {self.step} already; give more, or leave it out"
                raise BadInput(f"--num_steps {options.num_steps}: {words}")
        if self.writes:
            self.cut_logs()
            write_json(os.path.join(self.out, "config.json"), config)

    def open(self, config: dict):
        """Locks the folder for the life of the process. A new one appears in one rename with its config.json
        inside, so that a run that is killed at any later moment can be resumed."""
        if not os.path.exists(self.out):
            os.makedirs(os.path.dirname(os.path.abspath(self.out)), exist_ok=True)
            with becoming(os.path.normpath(self.out)) as beside:
                os.mkdir(beside)
                write_json(os.path.join(beside, "config.json"), config)
        refusal = f"--out {self.out}: another process is running it"
        self.lock_file = locked(os.path.join(self.out, "lock"), refusal)
        check_folder(self.options)  # again: another run may have begun and ended there while this one loaded
        remove_leftovers(self.out)
        with open(os.path.join(self.out, "sessions.log"), "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join(sys.argv)}\n")

    def cut_logs(self):
        """Takes out of the logs what the checkpoint does not know of; metrics.jsonl must have every step."""
        for name, last in LOGS.items():
            last = self.step + last if self.options.resume else -1
            if name == "evaluations" and "first_look" not in self.progress:
                last = -1
            path = os.path.join(self.out, f"{name}.jsonl")
            rows = cut_back(path, {"step": int}, lambda row, last=last: row["step"] <= last)
            if name == "metrics" and [row["step"] for row in rows] != list(range(self.step)):
                raise BadInput(f"{path}: not a row for each of the {self.step} steps before; {COPY_AGAIN}")

    def begin(self, evaluation, strips: dict):
        """Draws the report's pictures and makes the first evaluation, which goes on where it was killed.
        evaluation(subset=, kept=): eval.evaluate of the policy as it is. strips: by a question's id a
        function that returns its video's frames as one JPEG."""
        from plumbing.report import strip_path

        self.evaluation = evaluation
        if self.writes:
            os.makedirs(os.path.join(self.out, "frames"), exist_ok=True)
            for name, strip in strips.items():
                path = strip_path(self.out, name)
                if not (self.options.resume and os.path.exists(path)):
                    write_whole(path, strip())
        if "before" not in self.progress:
            before, values = self.evaluate()
            self.progress |= {"before": before, "before_values": values}
            self.save()

    def evaluate(self, subset: int = 0, step: int | None = None) -> tuple[dict, dict]:
        """The evaluation of the policy of a step, by default this one. Its answers are kept."""
        step = self.step if step is None else step
        kinds = {"greedy": str, "sampled": list[str]}
        path, then = os.path.join(self.out, "answers.jsonl"), self.end_evaluation
        return self.evaluation(subset=subset, kept=Kept(path, kinds, self.writes, then=then, step=step))

    def end_evaluation(self):
        """Ends the run early between two batches of an evaluation, where one process alone is running it."""
        if self.interrupted() and process_info()[1] == 1:
            raise EndedEarly(f"stopped in an evaluation; its answers are kept; {self.go_on()}")

    def end(self, load_adapter) -> tuple[dict, dict]:
        """The evaluation of what the run ends with: the last adapter, or with --keep best the best."""
        if self.options.keep == "last":
            return self.evaluate()
        load_adapter(os.path.join(self.out, "best"))
        return self.evaluate(step=self.progress["best"]["step"])

    def look(self):
        """An evaluation while the run goes on, with a line about it. The best adapter so far is kept. If the
        policy games its oracle, a category falls here, while the oracle's own numbers look well."""
        from plumbing.progress import evaluation_line

        results, _ = self.evaluate(self.options.eval_subset)
        first = self.progress.setdefault("first_look", results["greedy"])
        best = self.progress.get("best", {"accuracy": -1.0})
        self.bar.say(evaluation_line(self.step, results["greedy"], first))
        if self.writes:
            self.append("evaluations.jsonl", [results])
        if results["greedy"]["accuracy"] > best["accuracy"]:
            self.progress["best"] = {"step": self.step, "accuracy": results["greedy"]["accuracy"]}
            self.save()

    def stalled(self) -> bool:
        """Whether the last --stop_after evaluations brought no better one, in all processes alike."""
        looks, best = self.options.stop_after, self.progress.get("best", {"step": self.step})
        long = looks and self.step - best["step"] >= looks * self.options.eval_every
        return any(reduce_sum(bool(long), device=self.device))

    def steps(self, total: int):
        """The numbers of the steps that are left. After each the run is saved if that is due. Ctrl-C, SIGTERM
        and SIGHUP end it early, in all processes after the same step."""
        from plumbing.progress import Bar

        every, board = self.options.eval_every, self.options.tensorboard
        self.bar = Bar(total, self.step, self.writes, os.path.join(self.out, "tensorboard") if board else "")
        if every and "first_look" not in self.progress:
            self.look()
        while self.step < total and not self.stalled():
            yield self.step
            self.step += 1
            if every and self.step % every == 0:
                self.look()
            stop = any(reduce_sum(self.interrupted(), device=self.device))
            bad = self.progress["bad_in_a_row"] >= self.options.max_bad_steps
            due = self.step % self.options.save_every == 0 or self.step == total
            if stop or bad or due or self.stalled():
                self.save()
            if bad:
                raise EndedEarly(
                    f"{self.options.max_bad_steps} non-finite losses in a row: stopped at step {self.step};"
                    f" see {self.out}/bad_batches; a lower --lr or --dtype float32 may help"
                )
            if stop and self.step < total:
                raise EndedEarly(self.go_on())
        if self.step < total:
            best = self.progress["best"]["step"]
            self.bar.say(f"stopped at step {self.step} (--stop_after): step {best} was the best evaluated")
        self.bar.close()

    def go_on(self) -> str:
        command = shlex.join(["python", "train.py", "--out", self.out, "--resume"])
        return f"saved at step {self.saved_step}; go on with: {command}"

    def stop_if(self, dead: str):
        """Saves and ends early if the judge is dead in any process: dead says why, "" if it is not. The step
        that is under way has changed nothing yet."""
        if any(reduce_sum(bool(dead), device=self.device)):
            self.save()
            raise EndedEarly(f"the judge is dead ({dead or 'in another process'}); {self.go_on()}")

    def catch(self, number, frame):
        self.signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def interrupted(self) -> bool:
        """Whether Ctrl-C, SIGTERM or SIGHUP came."""
        return bool(self.signals)

    @contextmanager
    def clock(self, part: str):
        """Counts the seconds of a part of a step, for metrics.jsonl."""
        self.bar.doing(part)
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def report(self, numbers: dict, examples: list[dict], batch: dict):
        """Writes a row of metrics.jsonl and the examples as rows of rollouts.jsonl. numbers["bad"]: a
        gradient was not finite; the batch is saved to be looked into."""
        from plumbing.resume import write_bad_batch

        whole = sum(self.seconds.values())
        numbers = numbers | {f"{part}_s": seconds for part, seconds in self.seconds.items()}
        numbers["tokens_per_s"] = numbers["tokens"] / whole
        numbers["oracle_share"] = self.seconds.get("oracle", 0.0) / whole
        self.seconds = {}
        self.progress["bad_steps"] += numbers["bad"]
        self.progress["bad_in_a_row"] = numbers["bad"] * (self.progress["bad_in_a_row"] + 1)
        if numbers["bad"]:
            path = write_bad_batch(self.out, self.step, batch)
            self.bar.say(
                f"step {self.step}: a gradient was not finite; its update is left out, batch saved in {path}"
            )
        self.progress["signal"] = self.progress.get("signal") or numbers["dead_groups"] < numbers["groups"]
        if not self.progress["signal"]:
            self.bar.help_without_signal(self.step)
        if self.writes:
            self.append("metrics.jsonl", [numbers])
            self.append("rollouts.jsonl", examples)
            self.bar.show(self.step, numbers)

    def append(self, name: str, rows: list[dict]):
        append_rows(os.path.join(self.out, name), [{"step": self.step, **row} for row in rows])

    def wall_s(self) -> float:
        """Seconds of the run, those before a resume included."""
        return self.progress.get("wall_s", 0.0) + time.monotonic() - self.began

    def save(self):
        """Replaces the checkpoint, once the logs are on the disk, and then the adapter."""
        from plumbing.resume import write_checkpoint

        if not self.writes:
            return
        for path in (os.path.join(self.out, f"{name}.jsonl") for name in LOGS):
            if os.path.exists(path):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        self.saved_step, progress = self.step, self.progress | {"step": self.step, "wall_s": self.wall_s()}
        write_checkpoint(os.path.join(self.out, CHECKPOINT), self.learner.tensors(), progress)
        self.write_adapter()

    def write_adapter(self):
        """Writes adapter/, and best/ too if this is the best step evaluated so far."""
        best = self.progress.get("best", {}).get("step") == self.step
        for name in ["adapter"] + ["best"] * best:
            self.save_adapter(os.path.join(self.out, name))

    def load(self):
        from plumbing.resume import read_checkpoint

        path = os.path.join(self.out, CHECKPOINT)
        tensors, self.progress = read_checkpoint(path)
        self.step = self.saved_step = self.progress.pop("step")
        try:
            self.learner.restore(tensors)
        except ValueError as error:
            raise BadInput(f"{path}: {error}; {COPY_AGAIN}") from error
        if self.writes:
            self.write_adapter()

    def finish(self, device: str, after: dict, gain: dict, table: str):
        """Writes results.json and report.html; prints the tables, the gains and where all lies."""
        if self.writes:
            from plumbing import progress

            progress.finish(self, device, after, gain, table)
