"""Every command in README and docs/ is run as it stands there, at small size, page by page and in order."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_docs import HOUSE, MODULES, PAGES

import train
from plumbing.options import parse_args

SMALL = "--num_train_clips 6 --num_eval_clips 3 --num_steps 1 --batch_prompts 8 --eval_samples 1 --lora_r 4"
# What is not run here, and where else it is
SKIPPED = {
    r"LLAVA_DIR|LLAMA_DIR|ALIGNED|TUNED|--policy DIR|--base nf4": "a large checkpoint: tests/checkpoints",
    r"URL": "a judge behind an address: tests/oracles/test_judge.py",
    r"pretrain\.py": "minutes: tests/core/test_pretrain.py and tests/oracles/test_ranker.py",
    r"experiments\.(study|bench)": "hours: tests/experiments",
    r"data\.py convert|gqa\.jsonl": "the files of a public data set: tests/videoqa/test_datasets.py",
    r"torchrun": "several processes: tests/core/test_train.py",
    r"--oracle trained": "the ranker that the pretraining left: tests/oracles/test_ranker.py",
}
PLACES = {
    "world/rl/eval16/clip2000006.mp4": "world/rl/eval3/clip2000002.mp4",
    "train60": "train6", "eval24": "eval3", "$SMALL": "", "PYTHONPATH=. ": "", "[RUN ..]": "runs/start",
    " NAME": " rule", "DATA.jsonl": "questions.jsonl", "runs/OTHER": "runs/start",
}  # fmt: skip
HERE = [page for page in PAGES if page.name != "RESULTS.md"]  # that page is a record of runs that were made


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    """The page's commands of ours in their order: lines of its blocks, and spans, which may break at a line's
    end."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```.*?^```", text, flags=re.M | re.S):
        told = [line for line in block.splitlines() if " python " in line]
        text = text.replace(block, "\n".join(f"    {line}" for line in told))
    found = []
    for piece in re.findall(r"^    .*$|`[^`]+`", text, flags=re.M):
        piece = re.sub(r"  +#.*$", "", piece.replace("\n", " ").strip("` "))
        match = re.search(r"(?:python (?:-m )?|torchrun \S+ )(\w+)\b.*", piece)
        found += [match[0].strip()] if match and match[1] in MODULES else []
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as its reader's: the weights, the oracles that the pages tell him to write, a file of
    predictions."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "weights").symlink_to(HOUSE / "weights")
    ours = [block for page in HERE for block in blocks(page, "python") if "video, reference" in block]
    (folder / "my_judge.py").write_text("\n\n".join(ours))
    return folder


def filled(line: str) -> str:
    """The command with a file or folder of ours for each name that a page leaves open."""
    for name, place in PLACES.items():
        line = line.replace(name, place)
    line = re.sub(r"\bRUN\b", "runs/start", line)
    line = re.sub(r"(--\w*videos) DIR", r"\1 world/rl/eval3", line)
    line = re.sub(r"(?<=[ ])(\w+)\.jsonl", r"world/rl/eval3/\1.jsonl", line)
    return line.replace("--adapter DIR", "--adapter runs/start/adapter")


def run(script, line: str):
    """Runs a command of a page in this process."""
    line = filled(line)
    words = shlex.split(line.removeprefix("python ").removeprefix("-m "))
    module = words.pop(0).removesuffix(".py")
    if module == "train" and "--resume" not in words:
        words += SMALL.split()
        words += [] if "--out" in words else ["--out", f"runs/{len(list(Path('runs').glob('*')))}"]
    return script(importlib.import_module(module).main, module, *words)


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page, home, script, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    if not (home / "runs").exists():  # what the pages' commands start from
        assert run(script, "python train.py --out runs/start").returncode == 0
        rows = [json.loads(row) for row in open("world/rl/eval3/questions.jsonl")]
        predictions = [json.dumps({"id": row["id"], "prediction": row["answer"]}) for row in rows]
        Path("world/rl/eval3/PRED.jsonl").write_text("\n".join(predictions))
        for name in ("selected", "held_out"):
            shutil.copy("world/rl/eval3/questions.jsonl", f"world/rl/eval3/{name}.jsonl")
    for folder in Path("runs").glob("*"):
        if folder.name != "start":
            shutil.rmtree(folder)
    shutil.rmtree("DIR", ignore_errors=True)  # of another page
    for block in blocks(page, "python"):
        if "more.jsonl" in block:
            exec(block.replace("train60", "train6").replace("eval24", "eval3"), {})
    for line in commands(page):
        if not any(re.search(pattern, line) for pattern in SKIPPED):
            done = run(script, line)
            assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_what_is_not_run_is_on_a_page_and_train_py_takes_its_options(monkeypatch):
    lines = [line for page in HERE for line in commands(page)]
    for pattern in SKIPPED:
        assert any(re.search(pattern, line) for line in lines), pattern
    tour = re.findall(r"`(--[a-z][^`]*)`", (HOUSE / "docs" / "tour.md").read_text(encoding="utf-8"))
    lines += [f"python train.py {' '.join(options.split())}" for options in tour]
    for line in lines:
        if line.startswith("python train.py") and "--resume" not in line:
            words = shlex.split(filled(line))[1:]
            monkeypatch.setattr("sys.argv", words)
            parse_args(train.Config, train.PRESETS)
