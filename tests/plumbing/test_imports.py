import ast
import re
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
RUN_TIME = {"torch", "numpy", "PIL", "av", "safetensors", "tqdm"}
PEERS = {"transformers", "peft", "trl", "datasets"}  # bench.py measures them where they are installed
BELOW = {
    "cli", "grpo_rank", "nf4", "lora", "clip", "model", "checkpoint", "answers", "world", "data", "oracle",
    "chat", "judge", "ranker", "rollout", "runs", "memory", "convert", "metrics", "video", "replay",
    "policies", "config",
}  # fmt: skip
MAY_IMPORT = dict.fromkeys(BELOW, set()) | {
    "model": {"clip", "lora", "cli"}, "lora": {"cli", "nf4"}, "world": {"cli"},
    "video": {"cli", "clip"}, "data": {"answers", "cli", "convert", "video"},
    "convert": {"cli"}, "metrics": {"answers"}, "runs": {"cli", "lora"},
    "memory": {"clip", "data", "grpo_rank", "lora", "model", "nf4"},
    "checkpoint": {"clip", "model", "cli", "lora", "nf4"},
    "policies": {"checkpoint", "cli", "clip", "data", "lora", "model", "runs"},
    "config": {"cli", "data", "judge"},
    "rollout": {"grpo_rank", "model", "data", "lora"},
    "oracle": {"answers", "cli", "clip", "model", "grpo_rank"}, "chat": {"cli"},
    "replay": {"answers", "cli", "oracle"},
    "judge": {"answers", "chat", "cli", "grpo_rank", "oracle", "replay", "video"},
    "ranker": {"answers", "cli", "data", "model", "oracle", "world"}, "pretrain": BELOW, "eval": BELOW,
    "train": BELOW | {"eval", "baselines"}, "baselines": BELOW, "selection": BELOW | {"eval"},
    "bench": BELOW | {"eval", "train"}, "report": BELOW | {"eval"}, "study": BELOW | {"eval"},
}  # fmt: skip
ROOMS = sorted(path.stem for path in HOUSE.glob("*.py"))


def imports(nodes):
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the house is flat: no relative imports"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_the_table_allows(room):
    assert room in MAY_IMPORT, f"{room}.py has no line in the table of rooms"
    tree = ast.parse((HOUSE / f"{room}.py").read_text(encoding="utf-8"))
    anywhere = imports(ast.walk(tree)) - set(sys.stdlib_module_names)
    ours = anywhere & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[room]
    packages = anywhere - ours
    # only inside the function that needs them
    lazy = {"tokenizers", "pyarrow"} | (PEERS if room == "bench" else set())
    assert packages - lazy <= RUN_TIME and not lazy & imports(tree.body)
    bare = {"grpo_rank": {"torch"}, "answers": {"numpy"}}  # the heart and the parser
    assert packages <= bare.get(room, packages)


def test_the_requirements_are_the_run_time_packages():
    lines = (HOUSE / "requirements.txt").read_text().split("\n")
    names = {re.match(r"[\w-]+", line)[0] for line in lines if line}
    assert names == RUN_TIME - {"PIL"} | {"pillow"}
