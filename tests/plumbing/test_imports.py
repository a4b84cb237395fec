"""The house plan, held against the code: which module may import which."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
FOLDERS = ("videoqa", "oracles", "checkpoints", "plumbing", "experiments")
RUN_TIME = {"torch", "numpy", "PIL", "av", "safetensors", "tqdm"}
OPTIONAL = {
    "tokenizers",
    "jinja2",
    "pyarrow",
    "tensorboard",
}  # imported only within the function that needs it
PEERS = {
    "transformers",
    "peft",
    "trl",
    "datasets",
    "torchcodec",
}  # MEASURING has them beside our own code where installed
MEASURING = ("experiments.bench", "experiments.step")
SCRIPTS = {"train", "eval", "ask", "pretrain", "selection", "baselines"}
# Top level, by what it may import beside plumbing; a folder's name stands for all of its modules
TOP = {
    "grpo_rank": set(),
    "clip": set(),
    "lora": set(),
    "oracle": {"grpo_rank", "videoqa"},
    "model": {"clip"},
    "data": {"videoqa"},
    "rollout": {"grpo_rank", "model", "lora", "data"},
}
LIBRARY = {*TOP, "videoqa", "oracles", "checkpoints"}
TORCH_ALONE = {"grpo_rank", "clip", "lora"}


def allowed(module: str) -> set[str]:
    """What a module may import of ours: names of the top level and of folders."""
    folder = module.rpartition(".")[0]
    if folder == "plumbing":
        return {"plumbing"}
    if folder == "videoqa":
        return {"videoqa", "plumbing"}
    if folder in ("oracles", "checkpoints"):
        return LIBRARY | {"plumbing"}
    if folder == "experiments":
        return LIBRARY | SCRIPTS | {"plumbing", "experiments"}
    if module in TORCH_ALONE:
        return set()
    if module in TOP:
        return TOP[module] | {"plumbing"}
    return LIBRARY | {"plumbing", "baselines"}  # a script


def modules() -> dict[str, Path]:
    files = [*HOUSE.glob("*.py"), *(path for folder in FOLDERS for path in (HOUSE / folder).glob("*.py"))]
    return {".".join(path.relative_to(HOUSE).with_suffix("").parts): path for path in sorted(files)}


MODULES = modules()


def imported(nodes) -> set[str]:
    """Dotted names that these nodes of a syntax tree import: of `from a import b` both a and a.b."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_house_plan_allows(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    anywhere = imported(ast.walk(tree))
    of_eval = {name for name in anywhere if name.startswith("eval.")}
    tables = {"eval.evaluate", "eval.gains", "eval.table"}  # all that is imported of a script
    ours = {name for name in anywhere if name in MODULES} - (
        {"eval"} if of_eval and of_eval <= tables else set()
    )
    places = {name.partition(".")[0] for name in ours}
    assert places <= allowed(module) | ({module} if module in SCRIPTS else set()), places - allowed(module)
    packages = {name.partition(".")[0] for name in anywhere} - set(sys.stdlib_module_names)
    packages -= {name.partition(".")[0] for name in MODULES}
    within = OPTIONAL | (PEERS if module in MEASURING else set())
    assert packages - within <= RUN_TIME
    assert not within & {name.partition(".")[0] for name in imported(tree.body)}
    if module in TORCH_ALONE:
        assert packages == {"torch"}


def test_the_top_level_is_the_papers_file_list():
    top = {module for module in MODULES if "." not in module}
    assert top <= {*TOP, *SCRIPTS} and {*TOP, "train", "eval", "pretrain", "selection"} <= top


def test_importing_train_loads_nothing_that_the_default_run_does_not_need():
    command = "import train, sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", command], cwd=HOUSE, capture_output=True, text=True)
    loaded = set(done.stdout.split()) & MODULES.keys()
    assert len(loaded) <= 17, sorted(loaded)
    chosen_later = {
        "oracles.judge", "oracles.chat", "oracles.cache", "oracles.ranker", "videoqa.datasets",
        "videoqa.scores", "checkpoints.nf4", "checkpoints.memory",
        "checkpoints.huggingface", "checkpoints.pretrained", "checkpoints.chat_tokenizer",
        "checkpoints.peft_files",
    }  # fmt: skip
    assert not loaded & chosen_later


def test_the_requirements_are_the_run_time_packages():
    lines = (HOUSE / "requirements.txt").read_text().split("\n")
    names = {re.match(r"[\w-]+", line)[0] for line in lines if line}
    assert names == RUN_TIME - {"PIL"} | {"pillow"}
