"""What a judge was asked before: its cache, and rankings from a file in place of any judge."""

import json
import os
import sqlite3
import threading
import time

import torch

from oracle import Ranking, checked_groups, competition_ranks, ranks_by_text
from plumbing.options import BadInput, is_kind, read_jsonl
from videoqa.answers import Question

# errors that room, rights or patience mend; all others are a damaged file's
OF_THE_DISK = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,
}  # fmt: skip
DAMAGED = (sqlite3.Error, UnicodeDecodeError)  # the latter where the error's words quote bytes of the file
CACHE_VERSION = 1  # of the file's layout and of the wording of judge.py's prompts


class Cache:
    """An sqlite file of rankings (and verdicts), and of failed replies as they came. For any number of
    processes at once.

    In WAL mode a commit is one append, so kill -9 loses at most the ranking being written. The file is made
    with the first ranking; without a path nothing is kept. BadInput: not such a file, or of another version.
    """

    TABLES = (
        "CREATE TABLE IF NOT EXISTS rankings"
        " (key TEXT PRIMARY KEY, judge TEXT, question TEXT, ranks TEXT, reply TEXT)",
        "CREATE TABLE IF NOT EXISTS failures"
        " (time REAL, judge TEXT, question TEXT, cause TEXT, replies TEXT)",
        f"PRAGMA user_version = {CACHE_VERSION}",
    )

    def __init__(self, path: str, option: str = "oracle"):
        self.path, self.option, self.lock, self.db = path, f"--{option}_cache", threading.Lock(), None
        self._run("SELECT 1")  # a file that is there is opened, and checked, at once

    def _open(self):
        try:
            db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            db.execute("BEGIN IMMEDIATE")  # one process at a time makes or checks the tables
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if not version and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                version = CACHE_VERSION
                for line in self.TABLES:
                    db.execute(line)
            db.execute("COMMIT")
            if version == CACHE_VERSION:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
        except DAMAGED as error:
            raise BadInput(f"{self.option} {self.path}: {error}; name another file") from error
        if version != CACHE_VERSION:
            wanted = f"is of version {version}, this code reads version {CACHE_VERSION}"
            raise BadInput(f"{self.option} {self.path}: {wanted}; name another file")
        self.db = db

    def _run(self, line: str, values: tuple = (), make: bool = False) -> list:
        with self.lock:
            if self.db is None and self.path and (make or os.path.exists(self.path)):
                self._open()
            if self.db is None:
                return []
            try:
                return self.db.execute(line, values).fetchall()
            except DAMAGED as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in OF_THE_DISK:
                    raise OSError(f"{self.path}: {error}") from error
                raise BadInput(f"{self.path}: damaged ({error}); name another file") from error

    def get(self, key: str) -> list[int] | dict | None:
        found = self._run("SELECT ranks FROM rankings WHERE key = ?", (key,))
        if not found:
            return None
        try:
            value = json.loads(found[0][0])
        except (ValueError, TypeError, RecursionError):
            value = None
        if value is None:
            raise BadInput(f"{self.path}: a row of it is damaged; name another file")
        return value

    def put(self, key: str, judge: str, question: str, value: list[int] | dict, reply: str):
        """Stores a ranking or a verdict, unless another process did: returns what the file now has, or the
        value where there is no file."""
        row = (key, judge, question, json.dumps(value), reply)
        self._run("INSERT OR IGNORE INTO rankings VALUES (?, ?, ?, ?, ?)", row, make=True)
        return self.get(key) if self.path else value

    def put_failure(self, judge: str, question: str, cause: str, replies: list[str]):
        row = (time.time(), judge, question, cause, json.dumps(replies, ensure_ascii=False))
        self._run("INSERT INTO failures VALUES (?, ?, ?, ?, ?)", row, make=True)

    def judges(self) -> list[str]:
        return [row[0] for row in self._run("SELECT DISTINCT judge FROM rankings")]


def lacks(path: str, question: Question, texts: list[str]) -> str:
    group = " | ".join(" ".join(text.split())[:40] for text in texts)[:200]
    return f"{path}: lacks the group of question {question.id} with answers {group}; replay the run it is of"


def check_cache(path: str, option: str) -> None:
    """Raises BadInput, before anything is asked, for the name of a cache that could keep nothing."""
    if path == ":memory:" or not os.path.isdir(os.path.dirname(path) or "."):
        raise BadInput(f"--{option}_cache {path}: no folder to keep it in; make one or name another file")


def is_cache(path: str) -> bool:
    """Whether a file is an sqlite one; else it is read as JSONL."""
    with open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


class ReplayOracle:
    """Ranks from a JSONL file, lines {"id", "candidates", "oracle_ranks"} as in a run's rollouts.jsonl."""

    KINDS = {"id": str, "candidates": list[str], "oracle_ranks": list[int], "oracle_ok": bool}

    def __init__(self, path: str):
        self.path, self.groups = path, {}
        wants = 'write {"id", "candidates", "oracle_ranks"}'
        for where, row in read_jsonl(path, wants):
            row = {"oracle_ok": True} | row
            for name, kind in self.KINDS.items():
                if not is_kind(row.get(name), kind):
                    raise BadInput(f"{where}: {name} is missing or of another kind; {wants}")
            texts, ranks = [text.strip() for text in row["candidates"]], row["oracle_ranks"]
            rank_of = dict(zip(texts, ranks, strict=False))
            if not ranks or len(ranks) != len(texts) or competition_ranks(ranks) != ranks:
                raise BadInput(f"{where}: oracle_ranks are no competition ranks of the candidates; {wants}")
            if [rank_of[text] for text in texts] != ranks:
                raise BadInput(f"{where}: identical candidates do not tie; give them one rank")
            order = dict(zip(rank_of, competition_ranks(list(rank_of.values())), strict=True))
            if row["oracle_ok"] and self.groups.setdefault((row["id"], frozenset(texts)), order) != order:
                raise BadInput(f"{where}: contradicts an earlier line of this group; leave one of them out")

    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> ranks (P, G). Raises BadInput, with the group, if the file lacks one."""
        ranks = []
        for question, group in zip(batch, checked_groups(batch, texts), strict=True):
            distinct = frozenset(group)
            alone = {group[0]: 0} if len(distinct) == 1 else None  # nothing to order
            rank_of = self.groups.get((question.id, distinct), alone)
            if not rank_of:
                raise BadInput(lacks(self.path, question, sorted(distinct)))
            ranks.append(ranks_by_text(group, rank_of))
        return Ranking(torch.tensor(ranks))
