"""What every script shares: options from dataclasses, bad input as one line, files read and written whole.

A script's options are the fields of one dataclass. It inherits the records of options that stand beside what
they configure (the policy's in checkpoints/policies.py, a run's in plumbing/run_folder.py), and every such
record is a headed group of `--help`. A field's type says what the option may be:

    group_size: Group = 5              # int, float, str or bool, or one of the bounded numbers below
    gain: Literal["divided", "appendix"] = "divided"
"""

import argparse
import contextlib
import ctypes
import difflib
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import unicodedata
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args, get_origin

from safetensors import SafetensorError, safe_open


class BadInput(ValueError):
    """Something the user gave is wrong. One line: the file, row or option, what is wrong, the remedy."""


class EndedEarly(Exception):
    """A run that stops before its last step. It is saved; the message is the line for the user."""


# ---- options


@dataclass(frozen=True)
class Bounds:
    """Numbers from low to high; with above, low itself is outside. NaN never lies within."""

    low: float
    high: float = math.inf
    above: bool = False

    def hold(self, value) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self):
        low = f"{'more than' if self.above else 'at least'} {self.low}"
        return low if self.high >= LARGEST else f"{low} and at most {self.high}"


Count = Annotated[int, Bounds(1, 10**9)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
CountOrNone = Annotated[int, Bounds(0, 10**9)]  # 0 means none, or all, as the option's help says
LARGEST = 1e30  # of a number; float32 ends at 3e38
Positive = Annotated[float, Bounds(0, LARGEST, above=True)]
NotNegative = Annotated[float, Bounds(0, LARGEST)]
Alpha = Annotated[float, Bounds(0, 10**5, above=True)]  # of LoRA
Share = Annotated[float, Bounds(0, 1)]
PositiveShare = Annotated[float, Bounds(0, 1, above=True)]


@dataclass
class Options:
    """What all records of options share: each value is checked against the type of its field."""

    def __post_init__(self):
        for field in fields(self):
            setattr(self, field.name, checked(field.name, field.type, getattr(self, field.name)))


def checked(name: str, kind, value):
    """The value, an int as a float where the field is one. BadInput: not of this kind, or out of bounds."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = ", ".join(map(str, get_args(kind)))
            raise BadInput(f"--{name} {value}: choose one of {choices}")
        return value
    kind, *bounds = get_args(kind) or (kind,)
    if kind is float and type(value) is int:
        value = float(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    if type(value) is not kind or (bounds and not bounds[0].hold(value)) or "\0" in str(value):
        raise BadInput(f"--{name} {value}: give {' '.join([words, *map(str, bounds)])}")
    if kind is str and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise BadInput(f"--{name} {value}: not a text in UTF-8; rename the file")
    return value


def shipped(folder: str) -> str:
    """A folder of this repository, from wherever a script is started: as it is written where the working
    directory has it, or else as an absolute path."""
    own = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), folder)
    return own if os.path.exists(own) and not os.path.exists(folder) else folder


@contextlib.contextmanager
def read_from(path: str):
    """Within it, a BadInput about an option also names the file that the option stands in."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{error}; it stands in {path}") from error


def check_record(record, where: str, wants: str) -> None:
    """Raises BadInput unless each field of a dataclass that was filled from a file is of its type, and a
    number above 0 wherever its default is."""
    for field in fields(record):
        value, kind = getattr(record, field.name), int | float if field.type is float else field.type
        good = value in get_args(kind) if get_origin(kind) is Literal else is_kind(value, kind)
        if not good or is_kind(value, int | float) and field.default > 0 and not value > 0:
            raise BadInput(f"{where}: {field.name} is {value!r}; {wants}")


def is_kind(value, kind) -> bool:
    """Whether a JSON value is of this type: int | float, list[str], or {"step": int}, an object with such
    a field. true and false are no numbers."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(is_kind(value.get(name), of) for name, of in kind.items())
    if get_origin(kind) is list:
        return isinstance(value, list) and all(is_kind(x, get_args(kind)[0]) for x in value)
    return isinstance(value, kind) and (kind is bool or type(value) is not bool)


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are BadInputs: one line instead of the whole usage."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args=None):
        """An unknown name is answered with the nearest known one. Options may stand between the words."""
        parse = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args
        parsed, unknown = parse(args)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise BadInput(f"{unknown[0]}: no such option; {meant}{self.prog} --help lists all")
        return parsed

    def error(self, message):
        raise BadInput(f"{message}; {self.prog} --help lists the options")


def add_options(parser: ArgumentParser, config_class) -> None:
    """`--name value` for every field of a dataclass, in a headed group for each record that it inherits.
    What is not given on the command line is not in the parser's result."""
    ours = {field.name: field for field in fields(config_class)}
    for record in config_class.__mro__:
        names = [name for name in vars(record).get("__annotations__", ()) if name in ours]
        group = parser.add_argument_group((record.__doc__ or "").partition("\n")[0] or None)
        source = inspect.getsource(record) if names else ""
        meaning = dict(re.findall(r"^    (\w+): (?:.*\(\n)?.*?  # (.*)", source, re.M))
        for field in (ours.pop(name) for name in names):
            kind, choices = (get_args(field.type) or (field.type,))[0], ""
            if get_origin(field.type) is Literal:
                kind, choices = str, "|".join(map(str, get_args(field.type)))
            words = filter(None, [choices, meaning.get(field.name, ""), f"({field.default!r})"])
            reading = {"type": some_text if kind is str else kind}
            if kind is bool:
                reading = {"type": true_or_false, "nargs": "?", "const": True}
            reading |= {"default": argparse.SUPPRESS, "metavar": "X"}
            group.add_argument(f"--{field.name}", help=" ".join(words).replace("%", "%%"), **reading)


def some_text(text: str) -> str:
    """A text on the command line. An empty one is most often a variable of the shell that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name something, or leave it out")
    return text


def true_or_false(text: str) -> bool:
    """The value of a word on the command line. argparse reports its error for any other word."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse_args(config_class, presets: dict[str, dict] | None = None, stored=lambda given: {}):
    """The script's dataclass from `--name value` options; a bool field takes no value or true|false.

    presets: other defaults for each value of the option preset. stored(given): defaults above those, of a
    resumed run. BadInput: an unknown name, an abbreviation, a value of another type or out of its bounds.
    """
    parser = ArgumentParser(description=sys.modules["__main__"].__doc__)
    add_options(parser, config_class)
    given = vars(parser.parse_args())
    preset = (presets or {}).get(given.get("preset"), {})
    return config_class(**{**preset, **stored(given), **given})


# ---- the script

# What PyTorch says where memory ends, on a GPU, on a CPU, and where a size is beyond any memory
NO_MEMORY = "out of memory|not enough memory|can't allocate memory|calculation overflowed"
LOST_PROCESS = r"gloo|NCCL.*(remote process|connection|peer)"  # what is told where one of several has died
LESS_MEMORY = "take smaller sizes: --micro_batch_prompts and --sample_prompts, --max_new_tokens, --group_size"


def one_line(text: str) -> str:
    """Without line breaks, control characters and lone surrogates, so that no path, reply or text of a video
    can forge a second message or steer a terminal."""
    spaced = " ".join(str(text).split())
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in spaced)


def cell(text: str) -> str:
    """As `one_line`, for a table in Markdown."""
    return one_line(text).replace("|", "/")


class Stdout:
    """Standard output that a reader may close (`| head`): then the script goes on and prints to nowhere."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # closed from the start

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str):
        self.kept_open(self.stream.write, text)

    def flush(self):
        self.kept_open(self.stream.flush)

    def kept_open(self, do, *given):
        try:
            do(*given)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def keep_memory() -> None:
    """Later garbage collections skip what is loaded now, and glibc keeps up to 2 GB of freed memory: asking
    the system for its pages again for each step's tensors would cost a tenth of a small step."""
    gc.freeze()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, size in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, size)


def run_script(main) -> None:
    """Runs a script and exits with its status, after one line on stderr unless it is 0. 2: what the user can
    mend, such as bad input, a full disk or too little memory; 130: Ctrl-C; 1: an early end. Any other error
    is a bug: its traceback, and 1."""
    keep_memory()
    fault, status = "", 2
    try:
        with contextlib.redirect_stdout(Stdout(sys.stdout)):
            status = main()
            sys.stdout.flush()
    except BadInput as error:
        fault = one_line(error)
        if len(fault) > 1000:  # a damaged file may hold a value of any length: keep name and remedy
            fault = f"{fault[:600]} .. {fault[-300:]}"
    except OSError as error:  # a full disk, no permission: the operating system names the file and the cause
        fault = f"{one_line(error)}; make room or choose another folder, then run again"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and re.search(LOST_PROCESS, str(error)):
            fault = f"another process of this run has ended ({one_line(error)[-80:]}); see what it said"
        elif isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error)):
            raise
        else:
            fault = f"not enough memory ({one_line(error)[:200]}); {LESS_MEMORY}"
    except UnicodeEncodeError as error:  # a file's name, or a word of the command line
        near = error.object[max(error.start - 40, 0) : error.end + 40]
        fault = f"{one_line(near)}: not a text in UTF-8; rename the file"
    except EndedEarly as error:
        print(f"\n{one_line(error)}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:  # where nothing is worth saving; train.py's loop catches Ctrl-C itself
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        os._exit(130)  # at once: threads that wait for a slow judge would hold sys.exit
    if fault:
        print(f"error: {fault}", file=sys.stderr)
    sys.exit(status or 0)


# ---- files


def parse_json(text: str | bytes, where: str, wants: str):
    """The JSON value of bytes or text from outside. BadInput, `where` first and `wants` last: not plain JSON
    in UTF-8, NaN, Infinity, a number beyond a float, nesting without end, a name twice in one object, half
    of a surrogate pair (no file could be written with it)."""

    def distinct(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
        return found

    def number(digits):
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"the number {digits[:20]} has no finite value")
        return value

    def integer(digits):
        if len(digits) > 300:
            raise ValueError(f"the number {digits[:20]}.. is too long")
        return int(digits)

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        numbers = dict(parse_float=number, parse_int=integer, parse_constant=number)
        value = json.loads(text, object_pairs_hook=distinct, **numbers)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({one_line(error)}); {wants}") from error
    return value


def read_bytes(path: str, wants: str) -> bytes:
    """A file's content. Raises BadInput if it is missing or cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}; {wants}") from error


def read_text(path: str, wants: str) -> str:
    """A file's content, line ends as they are. Raises BadInput if it is missing or not in UTF-8."""
    try:
        return read_bytes(path, wants).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not a UTF-8 text ({error.reason}); {wants}") from error


def read_json(path: str, wants: str, optional: bool = False) -> dict:
    """The JSON object in a file; an empty one where an optional file is not there. Raises BadInput if there
    is none."""
    if optional and not os.path.exists(path):
        return {}
    value = parse_json(read_bytes(path, wants), path, wants)
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object; {wants}")
    return value


def read_jsonl(path: str, wants: str) -> Iterator[tuple[str, dict]]:
    """("PATH, line N", row) of a file with one JSON object a line; blank lines are passed over. Raises
    BadInput at the first line that holds none."""
    for number, line in enumerate(read_bytes(path, wants).splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            row = parse_json(line, where, wants)
            if not isinstance(row, dict):
                raise BadInput(f"{where}: not a JSON object; {wants}")
            yield where, row


def read_tensors(path: str, wants: str) -> tuple[dict, dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file. Raises BadInput if it is missing or damaged, and for
    numbers that are no floats, NaN or infinite."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file; {wants}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
        for name, x in tensors.items():
            if not x.is_floating_point():
                raise BadInput(f"{path}: {name} is not stored as floats; use a sound copy of this file")
            if not x.float().isfinite().all():
                raise BadInput(f"{path}: {name} holds NaN or infinity; use a sound copy of this file")
    except (OSError, SafetensorError, NotImplementedError) as error:  # the last for numbers of 4 bits
        raise BadInput(f"{path}: {one_line(error)}; {wants}") from error
    return tensors, metadata


PICKLES = (".bin", ".pt", ".pth")


def refuse_pickles(path: str, wanted: str = "model.safetensors") -> None:
    """Raises BadInput for a file that is a pickle, and for a folder with a pickle and no file `wanted`."""
    path = os.fspath(path)
    pickles = [path] if path.endswith(PICKLES) else []
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, wanted)):
        pickles = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.endswith(PICKLES)]
    if pickles:
        raise BadInput(
            f"{pickles[0]}: a pickle, which can run code; trust it? convert it:"
            f" safetensors.torch.save_file(torch.load(FILE, weights_only=True), {wanted!r})"
        )


@functools.cache
def place() -> str:
    """8 hex digits of this machine, or container: where a process number means one process."""
    inside = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    return hashlib.sha256(f"{socket.gethostname()} {inside}".encode()).hexdigest()[:8]


def temporary_name(path: str) -> str:
    """A name beside path that no other process takes, and that tells whose it is."""
    return f"{path}.{os.getpid()}.{place()}{uuid.uuid4().hex[:8]}.tmp"


@contextlib.contextmanager
def naming(path: str):
    """Within it, an error of the disk names this file. The system's own error of a full disk names none."""
    try:
        yield
    except OSError as error:
        error.filename = path
        raise


@contextlib.contextmanager
def becoming(path: str):
    """A temporary name to make a file or folder under. It becomes `path` in one rename: whole or not at all.
    What killed processes left of it goes."""
    remove_leftovers_of(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        remove(temporary)


def write_whole(path: str, content: bytes) -> None:
    """Writes a file whole or not at all, also when two processes write it, when the disk is full and when the
    machine stops. A file that holds this already is left as it is. A link leads to its file; a device is
    written to."""
    if os.path.exists(path) and not os.path.isfile(path):
        with naming(path), open(path, "wb") as file:
            file.write(content)
        return
    path = os.path.realpath(path)
    if os.path.exists(path) and os.path.getsize(path) == len(content):
        with open(path, "rb") as file:
            if file.read() == content:
                return
    with becoming(path) as temporary, naming(path), open(temporary, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def refuse_same(output: str, *inputs: str) -> None:
    """BadInput where a file to write is one that is read, too. "" is no file; a device may be both."""
    if not os.path.exists(output) or os.path.isfile(output):
        real = os.path.realpath(output)
        for path in filter(None, inputs if output else ()):
            if os.path.realpath(path) == real:
                raise BadInput(f"{output}: would be written over {path}; name another file to write")


def is_alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # the latter for a number that no process can have
        return False
    except PermissionError:  # another user's
        return True
    return True


# A temporary_name: what it was to become, whose it is, and where that process runs
LEFT = re.compile(r"(.+)\.(\d+)\.([0-9a-f]{8})[0-9a-f]{8}\.tmp")
FOREIGN_SECONDS = 3600  # of another machine or container: after this long without a change it is left behind


def left_behind(folder: str, names: list[str]) -> Iterator[tuple[str, str]]:
    """(what it was to become, its path) of each temporary name in the folder whose process was killed."""
    for match in filter(None, map(LEFT.fullmatch, names)):
        path, ours = os.path.join(folder, match[0]), match[3] == place()
        with contextlib.suppress(FileNotFoundError):  # it has been renamed just now
            age = time.time() - os.path.getmtime(path)
            if (ours and not is_alive(int(match[2]))) or (not ours and age > FOREIGN_SECONDS):
                yield match[1], path


@functools.cache
def left_in(folder: str) -> list[tuple[str, str]]:
    """`left_behind` when this process first writes in the folder: a folder of many clips is listed once."""
    return list(left_behind(folder, os.listdir(folder)))


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process removed it just now
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def remove_leftovers_of(path: str) -> None:
    """Removes what killed processes left beside a file or folder that they were about to name `path`."""
    folder, name = os.path.split(os.path.abspath(path))
    for target, left in left_in(folder):
        if target == name:
            remove(left)


def remove_leftovers(folder: str) -> None:
    """Removes the temporary files of `write_whole` in and below the folder whose process was killed."""
    for parent, _, names in os.walk(folder):
        for _, left in left_behind(parent, names):
            remove(left)


def finite(value):
    """A JSON value with null for numbers that are none, NaN or infinite, which `parse_json` refuses."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str, value) -> None:
    write_whole(path, json.dumps(finite(value), indent=1, ensure_ascii=False).encode())


def json_lines(rows) -> str:
    """JSON objects as a file holds them, one a line."""
    return "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)
