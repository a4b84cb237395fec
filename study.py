"""Studies of many training runs, a table in RESULTS.md each. A run that has ended is not run again; one that
was broken off goes on.

    python study.py oracle [--out DIR] [--seeds N] [-- OPTIONS OF train.py]    # faulty oracles
    python study.py reward [--out DIR] [--seeds N] [-- OPTIONS OF train.py]    # Temporal-R1's rewards
"""

import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

from cli import ArgumentParser, BadInput, run_script, write_json, write_whole
from config import Config
from eval import draw_world, world_folders

HOUSE = os.path.dirname(os.path.abspath(__file__))
# What is wrong with the oracle, and what is done about it: options of train.py
STUDY = {"no noise": ""} | {f"swap {x}": f"--swap_prob {x}" for x in (0.1, 0.2, 0.3, 0.4, 0.5)}
STUDY |= {f"bias {x}": f"--position_bias {x}" for x in (0.3, 0.6)}
for fault in ("swap 0.3", "bias 0.6"):
    STUDY |= {f"{fault}, k = {k}": f"{STUDY[fault]} --oracle_permutations {k}" for k in (3, 5)}
    STUDY[f"{fault}, k = 5, W"] = f"{STUDY[fault]} --oracle_permutations 5 --oracle_agreement scale"
    STUDY[f"{fault}, anchor"] = f"{STUDY[fault]} --anchor"


def oracle_study(folder: str, seeds: int, options: list[str], page: str) -> str:
    """Trains with every faulty oracle of STUDY and every seed; see `train_lines`."""
    return train_lines("oracle_study", STUDY, study_table, folder, seeds, options, page)


def train_lines(name, lines: dict, table, folder: str, seeds: int, options: list[str], page: str, **blanks):
    """Trains each of `lines` (options of train.py) with each seed. After each run the `table` so far goes
    into `page`, between its lines <!-- name -->. blanks: what `lines` leave open. Returns the table.

    A run that has ended is not run again, one that was broken off goes on.
    """
    between(page, name)  # before hours of training
    os.makedirs(folder, exist_ok=True)
    stored = os.path.join(folder, "options.json")
    if not os.path.exists(stored):
        write_json(stored, options)
    with open(stored) as file:
        if (old := json.load(file)) != options:
            raise BadInput(f"{stored}: the runs there have options {old}, not {options}; name another --out")
    for seed in range(seeds):
        for line, special in lines.items():
            out = study_run(folder, line, seed)
            if not os.path.exists(os.path.join(out, "results.json")):
                command = [sys.executable, os.path.join(HOUSE, "train.py"), "--out", out]
                if os.path.exists(os.path.join(out, "checkpoint.safetensors")):
                    command.append("--resume")
                else:
                    shutil.rmtree(out, ignore_errors=True)  # it was broken off before it had learned anything
                    special = special.format(folder=folder, seed=seed, **blanks).split()
                    command += ["--seed", str(seed), *options, *special]
                if status := subprocess.run(command).returncode:
                    raise BadInput(f"{out}: training ended with status {status}; mend that, run this again")
            write_whole(page, between(page, name, table(folder, seeds)).encode())
    return table(folder, seeds)


# What is rewarded, and what is learned from: the whole data, the third of it that selection.py keeps, or as
# many questions drawn blindly.
REWARDS = {"the right answer alone": "--objective grpo --continuous_coef 0"}
REWARDS |= {"dual reward": "--objective grpo", "dual reward, ranked": "--oracle sum"}
REWARDS |= {"dual reward, half the steps": "--objective grpo --num_steps {half}"}
for line, part in (("selected", "selected"), ("a random third", "random")):
    REWARDS[f"dual reward, half the steps, {line}"] = REWARDS["dual reward, half the steps"] + (
        f" --data {{folder}}/{part}_{{seed}}.jsonl --videos {{train}}"
        " --eval_data {held}/questions.jsonl --eval_videos {held}"
    )


def reward_study(folder: str, seeds: int, options: list[str], page: str, clips=(500, 250)) -> str:
    """Temporal-R1 on the embedded world: selects the data, trains every line of REWARDS with every seed.
    clips: how many to learn from, how many held out."""
    sizes = dict(zip(("num_train_clips", "num_eval_clips"), clips, strict=True))
    drawn = SimpleNamespace(world_dir=os.path.join(folder, "world"), **sizes)
    draw_world(drawn)
    train, held = (path for path, _ in world_folders(drawn).values())
    data = os.path.join(train, "questions.jsonl")
    selection = [sys.executable, os.path.join(HOUSE, "selection.py"), data, "--videos", train]
    selection += ["--k", "8", "--share", "0.3333"]
    for seed in range(seeds):
        out, blind = (os.path.join(folder, f"{part}_{seed}.jsonl") for part in ("selected", "random"))
        command = [*selection, "--seed", str(seed), "--out", out]
        if not os.path.exists(out) and (status := subprocess.run(command).returncode):
            raise BadInput(f"{out}: selection ended with status {status}; mend that, run this again")
        with open(data, "rb") as every, open(out, "rb") as chosen:
            count = len(chosen.readlines()) - 1  # less the report
            rows = random.Random(seed).sample(every.readlines(), count)
        write_whole(blind, b"".join(rows))
    common = ["--world_dir", drawn.world_dir]
    common += [word for name, n in sizes.items() for word in (f"--{name}", str(n))]
    study = folder, seeds, [*common, *options], page
    steps = options[options.index("--num_steps") + 1] if "--num_steps" in options else Config.num_steps
    blanks = dict(train=train, held=held, half=int(steps) // 2)
    return train_lines("reward_study", REWARDS, reward_table, *study, **blanks)


def reward_table(folder: str, seeds: int) -> str:
    """A row a line of REWARDS: held-out greedy numbers in percent, mean and range over the seeds."""
    lines = ["| learned from | seeds | answers right | mean IoU of spans | R@1, IoU 0.7 |", "|---" * 5 + "|"]

    def row(name, results):
        greedy, columns = [r["greedy"] for r in results], []
        spans = [r["by_category"]["Temporal Grounding"] for r in greedy]
        right = [(r["accuracy"] * r["n"] - s["accuracy"] * s["n"]) / (r["n"] - s["n"])
                 for r, s in zip(greedy, spans, strict=True)]  # fmt: skip
        for values in (right, [r["mean_iou"] for r in greedy], [s["accuracy"] for s in spans]):
            values = [100 * x for x in values]
            columns.append(f"{sum(values) / len(values):.1f} [{min(values):.1f}, {max(values):.1f}]")
        lines.append("| " + " | ".join([name, str(len(results)), *columns]) + " |")

    for name in REWARDS:
        paths = [os.path.join(study_run(folder, name, seed), "results.json") for seed in range(seeds)]
        found = []
        for path in filter(os.path.exists, paths):
            with open(path) as file:
                found.append(json.load(file))
        if found and len(lines) == 2:
            row("nothing yet: the supervised start", [r["before"] for r in found])
        if found:
            row(name, [r["after"] for r in found])
    return "\n".join(lines)


def study_run(folder: str, name: str, seed: int) -> str:
    return os.path.join(folder, f"{name.replace(',', '').replace(' ', '_')}_{seed}")


def study_table(folder: str, seeds: int) -> str:
    """A row a kind of oracle: gains in points, mean and range over the seeds; W: mean over all steps."""
    lines = ["| oracle | seeds | greedy gain | sampled gain | of the gain without noise | Kendall's W |"]
    lines.append("|---" * 6 + "|")
    clean = None
    for name in STUDY:
        runs = [study_run(folder, name, seed) for seed in range(seeds)]
        runs = [run for run in runs if os.path.exists(os.path.join(run, "results.json"))]
        if not runs:
            continue
        gained, agreed = {"greedy": [], "sampled": []}, []
        for run in runs:
            with open(os.path.join(run, "results.json")) as file:
                gain = json.load(file)["gain"]
            for mode, found in gained.items():
                found.append(100 * gain[mode]["accuracy"])
            with open(os.path.join(run, "metrics.jsonl")) as file:
                agreed += [row["kendall_w"] for row in map(json.loads, file) if "kendall_w" in row]
        cells = [name, str(len(runs))]
        cells += [f"{sum(g) / len(g):+.1f} [{min(g):+.1f}, {max(g):+.1f}]" for g in gained.values()]
        mean = sum(gained["sampled"]) / len(runs)
        clean = mean if name == "no noise" else clean
        cells.append(f"{mean / clean:.0%}" if clean else "")
        cells.append(f"{sum(agreed) / len(agreed):.2f}" if agreed else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def between(path: str, name: str, text: str = "") -> str:
    """The file's text with `text` put between the lines <!-- name --> and <!-- /name -->."""
    with open(path, encoding="utf-8") as file:
        page = file.read()
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if first not in page or last not in page:
        raise BadInput(f"{path}: has no lines {first.strip()} and {last}; put them where the table belongs")
    return page[: page.index(first) + len(first)] + text + "\n" + page[page.index(last) :]


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    studies = {"oracle": (oracle_study, "what faults of the oracle cost, and what helps")}
    studies["reward"] = reward_study, "what the dual reward and the selection of data bring"
    for name, (_, words) in studies.items():
        study = commands.add_parser(name, help=words)
        study.add_argument("--out", default=f"runs/{name}_study")
        study.add_argument("--seeds", type=int, default=3)
        study.add_argument("--page", default=os.path.join(HOUSE, "RESULTS.md"), help="has the table's place")
        study.add_argument("options", nargs="*", help="options of train.py for every run")
    args = parser.parse_args()
    print(studies[args.command][0](args.out, args.seeds, args.options, args.page))
    return 0


if __name__ == "__main__":
    run_script(main)
