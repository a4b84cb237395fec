"""README and docs/ are held against the code: their size, and every file, function and option they name."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from baselines import group_zscores
from grpo_rank import rank_advantages
from oracle import FunctionOracle
from videoqa.answers import Question

HOUSE = Path(__file__).parents[2]
README = (HOUSE / "README.md").read_text(encoding="utf-8")
PAGES = [HOUSE / "README.md", HOUSE / "RESULTS.md", *sorted((HOUSE / "docs").glob("*.md"))]
FOLDERS = ("videoqa", "oracles", "checkpoints", "plumbing", "experiments", "tests", "docs", "weights")
MODULES = {path.stem for path in HOUSE.glob("*.py")} | set(FOLDERS[:5])
SUFFIXES = {"py", "md", "json", "jsonl", "safetensors", "txt", "sqlite", "cff"}
THE_READERS_OWN = {"my_judge.py"}  # files that a page tells its reader to write
THE_RUNS_OWN = {
    "adapter/",
    "bad_batches/",
    "best/",
    "tensorboard/",
    "frames/",
    "table.md",
}  # folders of a run folder
OTHER_PROGRAMS = ("pip", "llama-server", "vllm", "ollama", "transformers")


def code(page: Path) -> list[str]:
    """What a page sets as code: the lines of its blocks and its spans. A block is fenced, or indented by four
    spaces behind an empty line."""
    pieces, prose, fenced, block, before = [], [], False, False, ""
    for line in page.read_text(encoding="utf-8").split("\n"):
        block = line.startswith("    ") and (block or not before.strip())
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or block:
            pieces.append(line.strip())
        else:
            prose.append(line)
        before = line
    return pieces + re.findall(r"`([^`\n]+)`", "\n".join(prose))


CODE = {page: code(page) for page in PAGES}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_is_short_and_its_first_formula_comes_early():
    lines = README.rstrip("\n").split("\n")
    formulas = [i for i, line in enumerate(lines, start=1) if "DCG(r) = 1 / ((1 + r) log2(2 + r))" in line]
    assert len(lines) <= 160 and len(README.split()) <= 1800 and formulas[0] <= 40


def test_the_algorithm_is_six_numbered_lines_each_with_a_formula_and_a_function():
    section = README.split("## The algorithm\n")[1].split("\n## ")[0]
    steps = re.split(r"^\d\. ", section, flags=re.M)[1:]
    assert re.findall(r"^(\d)\. ", section, flags=re.M) == list("123456")
    for step in steps:
        spans = re.findall(r"`([^`]+)`", step.split("\n\n")[0])
        assert any(re.search(r"[=~(].* ", span) for span in spans), step
        assert any(re.fullmatch(r"[a-z_]+\.[A-Za-z_]+", span) for span in spans), step


def test_the_readme_names_all_of_the_top_level_all_folders_and_all_pages():
    for path in HOUSE.glob("*.py"):
        assert f"| `{path.name}` |" in README, path.name
    for folder in FOLDERS[:5]:
        assert f"| `{folder}/` |" in README, folder
    for page in (HOUSE / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README, page.name


@each_page
def test_every_file_that_a_page_names_is_there(page):
    named = {(page.parent, link) for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))}
    for piece in CODE[page]:
        for word in re.findall(r"[\w./-]+", piece):
            ours = word.partition("/")[0] in FOLDERS and "/" in word
            if ours or re.fullmatch(r"[\w/-]+(\.py|\.md|\.cff|/)|requirements[\w-]*\.txt", word):
                named.add((HOUSE, word.rstrip(".")))
    missing = {name for root, name in named if not (root / name).exists()}
    assert missing <= THE_READERS_OWN | THE_RUNS_OWN


@each_page
def test_every_function_that_a_page_names_is_there(page):
    for piece in CODE[page]:
        for name in re.findall(r"(?<![\w./-])[a-z_]\w*(?:\.\w+)+(?![\w/])", piece):
            first, *rest = name.split(".")
            if first not in MODULES or rest[-1] in SUFFIXES:
                continue
            split = 2 if first in FOLDERS else 1
            found = importlib.import_module(".".join([first, *rest][:split]))
            for part in [first, *rest][split:]:
                assert part in dir(found), f"{page.name}: {name}"
                found = getattr(found, part)


def commands(piece: str) -> list[tuple[str, list[str], list[str]]]:
    """(module, words before its options, options) of each of our commands in a line. What stands behind
    " -- " goes to train.py."""
    found = []
    piece = re.sub(r"\s#.*| && ", lambda m: "\n" if "&&" in m[0] else "", piece)
    for line in re.sub(r"--nproc_per_node=\w+ ", "", piece).split("\n"):
        match = re.search(r"(?:python|torchrun) (?:-m )?([\w.]+)(.*)", line)
        module = match and match[1].removesuffix(".py")
        if match and module.partition(".")[0] in MODULES:
            own, _, trains = match[2].partition(" -- ")
            found.append((module, own.split(" -")[0].split(), re.findall(r"(?<![\w-])--\w+", own)))
            found.append(("train", [], re.findall(r"--\w+", trains)))
    return found


@pytest.fixture(scope="module")
def known_options():
    return {}


@pytest.fixture
def options_of(script, known_options):
    """options_of(module, words): the options that --help of the command lists, its subcommand's if the first
    word names one."""

    def listed(module: str, words: list[str]) -> set[str]:
        if (module, *words) not in known_options:
            main = importlib.import_module(module).main
            done = script(main, module, *words, "--help")
            assert done.returncode == 0, f"{module} {words}: {done.stderr}"
            pattern = r"^ +(?:-\w, )?(--\w+)|^ *\{([\w,]+)\}"
            known_options[(module, *words)] = re.findall(pattern, done.stdout, flags=re.M)
        return known_options[(module, *words)]

    def options(module: str, words: list[str]) -> set[str]:
        found = listed(module, [])
        subcommands = {name for _, names in found for name in names.split(",") if name}
        if subcommands:
            assert words and words[0] in subcommands, f"{module} {words}: no such command"
            found = listed(module, words[:1])
        return {name for name, _ in found}

    return options


COMMANDS = [
    ("train", []), ("ask", []), ("plumbing.report", []), ("pretrain", []),
    ("selection", []), ("experiments.bench", []), ("videoqa.world", []),
    *(("eval", [name]) for name in ("run", "compare", "score", "merge")),
    *(("data", [name]) for name in ("check", "convert")),
    *(("experiments.study", [name]) for name in ("oracle", "reward", "selection")),
]  # fmt: skip


@each_page
def test_every_option_that_a_page_names_is_known_to_its_command(page, options_of):
    anywhere = set().union(*(options_of(*command) for command in COMMANDS))
    for piece in CODE[page]:
        if piece.startswith(OTHER_PROGRAMS) and "python" not in piece:
            continue
        asked = commands(piece)
        for module, words, options in asked:
            if options or words:
                unknown = set(options) - options_of(module, words)
                assert not unknown, f"{page.name}: {piece}: {module} has no {unknown}"
        if not asked:
            unknown = set(re.findall(r"(?<![\w-])--\w+", piece)) - anywhere
            assert not unknown, f"{page.name}: {piece}: nothing has {unknown}"


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"pip install -r requirements-dev\.txt && python -m pytest -q -n 2", README)[0]
    assert command in (HOUSE / ".ci/run").read_text()
    assert "-r requirements.txt" in (HOUSE / "requirements-dev.txt").read_text().split("\n")


def test_the_core_tests_need_pytest_and_hypothesis_alone():
    theirs = {"pytest", "hypothesis", "torch", "numpy", "PIL", "av", "safetensors", "tqdm"}
    ours = MODULES | {path.stem for path in HOUSE.glob("tests/*/*.py")}
    for path in (HOUSE / "tests/core").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            packages = {name.partition(".")[0] for name in names} - ours - set(sys.stdlib_module_names)
            assert packages <= theirs, f"{path.name}: {packages - theirs}"


# ---- the numbers that README prints


def test_the_advantages_in_the_readme_are_those_of_the_code():
    advantages = rank_advantages(torch.arange(5)[None])
    words = ", ".join(f"{a:+.3f}" for a in advantages[0].tolist())
    assert f"with ranks 0 1 2 3 4 get the advantages {words}:" in README
    rms = [f"{x.square().mean().sqrt():.2f}" for x in (advantages, group_zscores(-torch.arange(5.0)[None]))]
    assert "{} at G = 5 ({} for z-scored GRPO)".format(*rms) in README


def test_the_sizes_in_the_readme_are_those_of_the_default():
    sizes = json.loads((HOUSE / "weights/config.json").read_text())
    model, clip = sizes["model"], sizes["clip"]
    side, N = clip["image_size"], (clip["image_size"] // clip["patch_size"]) ** 2
    frames = f"K = {model['num_frames']} frames of {side} x {side} pixels, N = {N}"
    tokens = f"{model['num_queries']} video tokens, D = {model['dim']}, V = {model['vocab_size']}"
    train = importlib.import_module("train").Config
    assert f"P = {train.batch_prompts}, G = {train.group_size}, {frames}, {tokens}" in README


def test_the_oracle_in_the_readme_works_and_has_at_most_ten_lines():
    source = README.split("```python\n")[1].split("```")[0]
    assert source.count("\n") <= 10
    exec(source, scope := {})
    question = Question("q", "v.mp4", "what?", "red")
    ranking = FunctionOracle(scope["shortest"]).rank([question], [["a red one", "red", "blue", "red"]])
    assert ranking.ranks.tolist() == [[3, 0, 2, 0]] and ranking.ok.all()
