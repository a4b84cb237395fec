"""Studies of many training runs, a table each: in DIR/table.md, and with --page in that page (RESULTS.md). A
run that has ended is not run again; one that was broken off goes on.

    python -m experiments.study oracle [--out DIR] [--seeds N] [-- OPTIONS OF train.py]  # faulty oracles
    python -m experiments.study reward [--out DIR] [--seeds N] [-- OPTIONS OF train.py]  # the dual reward
    python -m experiments.study selection [--out DIR] [--seeds N] [-- OPTIONS ..]  # and its selection of data
    python -m experiments.study rivals|feedback|fill [--out DIR] [--seeds N] -- OPTIONS  # rivals.py
"""

import os
import random
import re
import subprocess
import sys
from dataclasses import fields
from functools import partial
from statistics import fmean

from checkpoints.policies import PolicyOptions
from data import DataOptions, draw_world, world_folders
from plumbing import report
from plumbing.options import (
    ArgumentParser,
    BadInput,
    Count,
    add_options,
    checked,
    is_kind,
    parse_json,
    read_bytes,
    read_json,
    read_jsonl,
    read_text,
    run_script,
    write_json,
    write_whole,
)
from plumbing.progress import markdown, read_results

HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN_WANTS = "remove its folder, then the study trains that run anew"
# What is wrong with the oracle, and what is done about it: options of train.py
STUDY = {"no noise": ""} | {f"swap {x}": f"--swap_prob {x}" for x in (0.1, 0.2, 0.3, 0.4, 0.5)}
STUDY |= {f"bias {x}": f"--position_bias {x}" for x in (0.3, 0.6)}
for fault in ("swap 0.3", "bias 0.6"):
    STUDY |= {f"{fault}, k = {k}": f"{STUDY[fault]} --oracle_permutations {k}" for k in (3, 5)}
    STUDY[f"{fault}, k = 5, W"] = f"{STUDY[fault]} --oracle_permutations 5 --oracle_agreement scale"
    STUDY[f"{fault}, anchor"] = f"{STUDY[fault]} --anchor"


def oracle_study(folder: str, seeds: int, options: list[str], page: str) -> str:
    """Trains with every faulty oracle of STUDY and every seed; see `train_lines`."""
    begin("oracle_study", folder, options, page)
    return train_lines("oracle_study", STUDY, study_table, folder, seeds, options, page)


def begin(name: str, folder: str, options: list[str], page: str, *more) -> None:
    """Before hours of training: `page`, if one is named, has the place, train.py has the options, and all
    runs that `folder` holds were made with these. more: what else decides them."""
    if page:
        between(page, name)
    settings(options)
    own = {"--out", "--seed", "--resume"} | ({"--lr"} if "--rates" in more else set())
    if given := own & {word.partition("=")[0] for word in options}:
        raise BadInput(f"{min(given)}: the study gives each run its own; leave it out behind --")
    os.makedirs(folder, exist_ok=True)
    stored, options = os.path.join(folder, "options.json"), [*options, *more]
    if not os.path.exists(stored):
        write_json(stored, options)
    old = parse_json(read_bytes(stored, "name another --out"), stored, "name another --out")
    if old != options:
        raise BadInput(f"{stored}: the runs there have options {old}, not {options}; name another --out")


def started(what: str, out: str, command: list[str]):
    """Runs one of this folder's scripts; BadInput if it did not end well."""
    if status := subprocess.run([sys.executable, os.path.join(HOUSE, command[0]), *command[1:]]).returncode:
        raise BadInput(f"{out}: {what} ended with status {status}; mend that, run this again")


def train_run(out: str, options: list[str]):
    """Trains into `out`; goes on where it was broken off, and does nothing where it has ended."""
    ended, begun = (os.path.exists(os.path.join(out, x)) for x in ("results.json", "checkpoint.safetensors"))
    if ended or begun:
        config = read_json(os.path.join(out, "config.json"), RUN_WANTS)
        for name, value in settings(options).items():  # but for what train.py itself decides
            if value not in ("auto", config.get(name, value)) and (name, value) != ("num_steps", 0):
                raise BadInput(f"{out}: has --{name} {config[name]}, not {value}; {RUN_WANTS}")
    if ended:
        if not os.path.exists(os.path.join(out, "report.html")):  # killed between the two
            report.write([out])
        return
    if begun:
        options = ["--resume"]
    started("training", out, ["train.py", "--out", out, *options])


def train_lines(name, lines: dict, table, folder: str, seeds: int, options: list[str], page: str, **blanks):
    """Trains each of `lines` (options of train.py) with each seed. After each run the `table` so far goes
    into `page`, between its lines <!-- name -->, and into the folder's table.md. blanks: what `lines` leave
    open. Returns the table."""
    for seed in range(seeds):
        for line, special in lines.items():
            special = [word.format(folder=folder, seed=seed, **blanks) for word in special.split()]
            train_run(study_run(folder, line, seed), ["--seed", str(seed), *options, *special])
            so_far = table(folder, seeds)
            write_whole(os.path.join(folder, "table.md"), f"{so_far}\n".encode())
            if page:
                write_whole(page, between(page, name, so_far).encode())
    return table(folder, seeds)


REWARDS = {"the right answer alone": "--objective grpo --continuous_coef 0"}
REWARDS |= {"dual reward": "--objective grpo", "dual reward, ranked": "--oracle sum"}
# What is learned from: the whole data, the third of it that selection.py keeps, or as many questions drawn
# blindly.
SELECTED = {"whole data": "--objective grpo"}
SELECTED["whole data, half the steps"] = "--objective grpo --num_steps {half}"
for part in ("selected", "random"):
    SELECTED[f"{part} third, half the steps"] = (
        f"--objective grpo --num_steps {{half}} --data {{folder}}/{part}_{{seed}}.jsonl --videos {{train}}"
        " --eval_data {held}/questions.jsonl --eval_videos {held}"
    )


def world_options(folder: str, clips: tuple[int, int]) -> tuple[list[str], str, str]:
    """Options of train.py for an embedded world in `folder`, and the folders of its two sets. clips: how many
    to learn from, how many held out."""
    train, held = clips
    drawn = DataOptions(world_dir=os.path.join(folder, "world"), num_train_clips=train, num_eval_clips=held)
    draw_world(drawn)
    options = ["--world_dir", drawn.world_dir, "--num_train_clips", str(train), "--num_eval_clips", str(held)]
    return options, *(path for path, _ in world_folders(drawn).values())


def reward_study(folder: str, seeds: int, options: list[str], page: str, clips=(500, 250)) -> str:
    """Temporal-R1's dual reward on the embedded world: trains every line of REWARDS with every seed."""
    options = [*world_options(folder, clips)[0], *options]
    begin("reward_study", folder, options, page)
    table = partial(answers_table, REWARDS)
    return train_lines("reward_study", REWARDS, table, folder, seeds, options, page)


def selection_study(folder: str, seeds: int, options: list[str], page: str, clips=(500, 250), warm_up=10):
    """Temporal-R1's selection on the embedded world: trains every line of SELECTED with every seed.

    The supervised start disagrees with itself nearly everywhere; so all lines start after `warm_up` steps on
    the whole data, when about a third of it is left to disagree on. 0: from the supervised start.
    """
    chosen = settings(options)
    half = chosen["num_steps"] // 2
    if half < 1:
        raise BadInput("selection: half of --num_steps is trained too; give at least 2 behind --")
    common, train, held = world_options(folder, clips)
    options = [*common, *options]
    begin("selection_study", folder, options, page, "--warm_up", str(warm_up))
    data, lines = os.path.join(train, "questions.jsonl"), SELECTED
    if warm_up:
        lines = {name: f"{line} --adapter {{folder}}/start_{{seed}}/adapter" for name, line in lines.items()}
    for seed in range(seeds):
        start, out, blind = (os.path.join(folder, f"{x}_{seed}") for x in ("start", "selected", "random"))
        command = ["selection.py", data, "--videos", train, "--out", f"{out}.jsonl", "--seed", str(seed)]
        command += ["--k", "8", "--share", "0.3333"]
        policy = {field.name: chosen[field.name] for field in fields(PolicyOptions) if field.name != "seed"}
        if warm_up:
            steps = ["--objective", "grpo", "--num_steps", str(warm_up)]
            train_run(start, ["--seed", str(seed), *options, *steps])
            policy["adapter"] = os.path.join(start, "adapter")
        # by the policy that is trained
        command += [f"--{name}={value}" for name, value in policy.items() if value != ""]
        if not os.path.exists(f"{out}.jsonl"):
            started("selection", out, command)
        with open(data, "rb") as every, open(f"{out}.jsonl", "rb") as kept:
            count = len(kept.readlines()) - 1  # less the report
            rows = random.Random(seed).sample(every.readlines(), count)
        write_whole(f"{blind}.jsonl", b"".join(rows))
    study = partial(answers_table, lines), folder, seeds, options, page
    return train_lines("selection_study", lines, *study, train=train, held=held, half=half)


def settings(options: list[str]) -> dict:
    """train.py's options by name, those that are not among these as it completes them."""
    from train import PRESETS, Config

    parser = ArgumentParser(prog="train.py")
    add_options(parser, Config)
    given = vars(parser.parse_args(options))
    chosen = vars(Config(**{**PRESETS.get(given.get("preset"), {}), **given}))
    return {name: value for name, value in chosen.items() if name not in ("out", "resume")}


def answers_table(names, folder: str, seeds: int) -> str:
    """A row a line of a study: held-out greedy numbers in percent, mean and range over the seeds."""
    lines = {}
    for name in names:
        if found := [answers_of(run) for run in ended_runs(folder, name, seeds)]:
            before, after = zip(*found, strict=True)
            lines.setdefault("nothing yet: the start", before)
            lines[name] = after
    rows = []
    for name, runs in lines.items():
        rows.append([name, len(runs), *map(mean_and_range, zip(*runs, strict=True))])
    return markdown(["learned from", "seeds", "answers right", "mean IoU of spans", "R@1, IoU 0.7"], rows)


def mean_and_range(values: list[float], sign: str = "") -> str:
    """As "mean [least, most]". sign: "+" for differences."""
    return f"{fmean(values):{sign}.1f} [{min(values):{sign}.1f}, {max(values):{sign}.1f}]"


def answers_of(run: str) -> list[tuple[float, float, float]]:
    """`answers_table`'s numbers of a run that has ended, in percent: before and after."""
    results, found = read_results(run, RUN_WANTS)[0], []
    for part in (results[when]["greedy"] for when in ("before", "after")):
        spans = part["by_category"].get("Temporal Grounding", {})
        numbers = [part.get("n"), part.get("mean_iou"), spans.get("n"), spans.get("accuracy")]
        if not is_kind(numbers, list[int | float]) or not part["n"] > spans["n"]:
            wants = "hold out questions of Temporal Grounding and others"
            raise BadInput(f"{run}/results.json: not right answers and spans; {wants}, then {RUN_WANTS}")
        right = part["accuracy"] * part["n"] - spans["accuracy"] * spans["n"]
        shares = right / (part["n"] - spans["n"]), part["mean_iou"], spans["accuracy"]
        found.append(tuple(100 * share for share in shares))
    return found


def study_run(folder: str, name: str, seed: int) -> str:
    return os.path.join(folder, f"{name.replace(',', '').replace(' ', '_')}_{seed}")


def ended_runs(folder: str, name: str, seeds: int) -> list[str]:
    runs = [study_run(folder, name, seed) for seed in range(seeds)]
    return [run for run in runs if os.path.exists(os.path.join(run, "results.json"))]


def study_table(folder: str, seeds: int) -> str:
    """A row a kind of oracle: gains in points, mean and range over the seeds; W: mean over all steps."""
    rows, clean = [], None
    for name in STUDY:
        runs = ended_runs(folder, name, seeds)
        if not runs:
            continue
        gains = [read_results(run, RUN_WANTS)[0]["gain"] for run in runs]
        greedy, sampled = ([100 * gain[mode]["accuracy"] for gain in gains] for mode in ("greedy", "sampled"))
        clean = fmean(sampled) if name == "no noise" else clean
        steps = [row for run in runs for _, row in read_jsonl(os.path.join(run, "metrics.jsonl"), RUN_WANTS)]
        agreed = [row["kendall_w"] for row in steps if is_kind(row.get("kendall_w"), int | float)]
        cells = [name, len(runs), mean_and_range(greedy, "+"), mean_and_range(sampled, "+")]
        cells.append(f"{fmean(sampled) / clean:.0%}" if clean else "")
        cells.append(f"{fmean(agreed):.2f}" if agreed else "")
        rows.append(cells)
    heads = ["oracle", "seeds", "greedy gain", "sampled gain", "of the gain without noise", "Kendall's W"]
    return markdown(heads, rows)


def between(path: str, name: str, text: str = "") -> str:
    """The file's text with `text` put between the lines <!-- name --> and <!-- /name -->. Line ends stay."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    wants = f"name a page with the lines {first} and {last} once each, where the table belongs"
    head, *parts = re.split(rf"({re.escape(first)}(?=\r?\n)|{re.escape(last)})", read_text(path, wants))
    if parts[::2] != [first, last]:
        raise BadInput(f"{path}: not such a page; {wants}")
    end = "\r\n" if parts[1].startswith("\r") else "\n"
    return head + first + end + (text + "\n").replace("\n", end) + last + parts[3]


def main() -> int:
    from experiments import rivals

    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    studies = {
        "oracle": (oracle_study, "what faults of the oracle cost, and what helps"),
        "reward": (reward_study, "what the dual reward brings"),
        "selection": (selection_study, "what the selection of data brings"),
        "rivals": (rivals.rivals_study, "GRPO_rank and its rivals on exact feedback"),
        "feedback": (rivals.feedback_study, "order and score with the same faults"),
        "fill": (rivals.fill_study, "batches filled up with groups that carry a signal"),
    }
    for name, (_, words) in studies.items():
        study = commands.add_parser(name, help=words)
        study.add_argument("--out", default=f"runs/{name}_study", help="folder of all its runs")
        study.add_argument("--seeds", type=int, default=3, help="runs of each line, from seed 0 on")
        study.add_argument("--page", default="", help="Markdown file with a place for the table (RESULTS.md)")
        study.add_argument("options", nargs="*", help="options of train.py for every run")
        if name in ("rivals", "feedback"):
            study.add_argument("--rates", type=float, nargs="+", default=rivals.RATES, help="learning rates")
        if name == "selection":
            study.add_argument("--warm_up", type=int, default=10, help="steps before anything is selected")
    args = parser.parse_args()
    more = {name: value for name, value in vars(args).items() if name in ("warm_up", "rates")}
    if "warm_up" in more:
        checked("warm_up", Count, args.warm_up)
    seeds = checked("seeds", Count, args.seeds)
    print(studies[args.command][0](args.out, seeds, args.options, args.page, **more))
    return 0


if __name__ == "__main__":
    run_script(main)
