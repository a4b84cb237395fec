"""What every script shares: options from a dataclass, bad input as one line, files written whole."""

import argparse
import inspect
import json
import os
import re
import sys
from dataclasses import fields


class BadInput(ValueError):
    """Something the user gave is wrong. One line: the file, row or option, what is wrong, the remedy."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are BadInputs: one line instead of the whole usage."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise BadInput(f"{message}; {self.prog} --help lists the options")


def add_options(parser: ArgumentParser, config_class, names) -> None:
    """`--name value` for these fields of a dataclass. What is not given is not in the parser's result."""

    def boolean(text):
        return {"true": True, "false": False}[text.lower()]

    meaning = dict(re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(config_class), re.M))
    for field in fields(config_class):
        if field.name in names:
            flag = {"nargs": "?", "const": True} if field.type is bool else {}
            kind = boolean if field.type is bool else field.type
            told = f"{meaning.get(field.name, '')} ({field.default!r})".replace("%", "%%").strip()
            parser.add_argument(f"--{field.name}", type=kind, default=argparse.SUPPRESS, help=told, **flag)


def parse_args(config_class, presets: dict[str, dict] | None = None, stored=lambda given: {}):
    """The script's dataclass from `--name value` options, one a field; a bool field takes no value or
    true|false. --help tells a field's comment and default.

    `presets` maps values of a field named preset to other defaults; `stored` makes yet others from what was
    given (a run's own options, when it is resumed). Unknown names, abbreviations and values of
    another type end the script: one line on stderr, status 2.
    """

    parser = ArgumentParser(description=sys.modules["__main__"].__doc__)
    add_options(parser, config_class, [field.name for field in fields(config_class)])
    given = vars(parser.parse_args())
    preset = (presets or {}).get(given.get("preset"), {})
    return config_class(**{**preset, **stored(given), **given})


def run_script(main) -> None:
    """Runs a script: status 0 done, 2 bad input, 130 Ctrl-C (one line on stderr), 1 anything else."""
    try:
        status = main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:  # a full disk, no permission: the operating system names the file and the cause
        print(f"error: {error}; make room or choose another folder, then run again", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # where nothing is worth saving; train.py's loop catches Ctrl-C itself
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        os._exit(130)  # at once: threads that wait for a slow judge would hold sys.exit
    sys.exit(status or 0)


def write_whole(path: str, content: bytes) -> None:
    """Writes the file under another name and renames it: whole or not at all, also on a full disk."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_json(path: str, value) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False).encode())
