"""What ranking buys: GRPO_rank against its rivals, on the same start, questions, uniforms and updates.

    python -m experiments.study rivals [--out DIR] [--seeds N] -- OPTIONS OF train.py    # exact feedback
    python -m experiments.study feedback [--out DIR] [--seeds N] -- OPTIONS OF train.py  # faulty feedback
    python -m experiments.study fill [--out DIR] [--seeds N] -- OPTIONS OF train.py      # batches filled up

Each line first looks for its own best of RATES on two other seeds, by the area under its sampled accuracy.
--rates R [R ..] tries others; a single one is taken for all. OPTIONS make the world, the start and the number
of steps; they must hold --eval_every. Runs lie in DIR; what has ended is not run again. The tables go into
RESULTS.md, the curves of `rivals` into figures/rivals.svg.
"""

import os
from functools import partial
from itertools import pairwise
from statistics import fmean, stdev

from experiments.study import RUN_WANTS, begin, ended_runs, settings, study_run, train_lines, train_run
from plumbing import page
from plumbing.options import BadInput, is_kind, read_jsonl, write_json, write_whole
from plumbing.progress import markdown, read_results

RATES = (3e-4, 1e-3, 3e-3)
RATE_SEEDS = (100, 101)  # the rates are found on them, and no table shows them
# Of Student's t for 2, 3, .. seeds; beyond the last its limit is near, and intervals are a little too wide
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12)

BY_SCORE = "--oracle sum --objective"  # the exact score, and for the others the order of that score
RIVALS = {
    "GRPO_rank": "--oracle sum",
    "GRPO_rank, printed form": "--oracle sum --advantage_form printed",
    "GRPO_rank, appendix gain": "--oracle sum --gain appendix",
    "GRPO": f"{BY_SCORE} grpo",
    "Dr. GRPO": f"{BY_SCORE} dr_grpo",
    "RLOO": f"{BY_SCORE} rloo",
    "PPO": f"{BY_SCORE} ppo",
    "DPO, best against worst": f"{BY_SCORE} dpo",
    "Plackett-Luce": f"{BY_SCORE} plackett_luce",
    "best of G": f"{BY_SCORE} best_of",
}
# A judge whose scale differs from question to question, and whose scores are noisy; its order is their order
BENT = "--oracle sum --score_bend 1 --score_noise 0.1"
FEEDBACK = {
    "exact order": "--oracle sum",
    "exact score": f"{BY_SCORE} grpo",
    "noisy order (swaps 0.3)": "--oracle sum --swap_prob 0.3",
    "bent score, GRPO": f"{BENT} --objective grpo",
    "bent score, RLOO": f"{BENT} --objective rloo",
    "bent score, PPO": f"{BENT} --objective ppo",
    "its order": BENT,
    "its order, printed form": f"{BENT} --advantage_form printed",
    "ranker's score, GRPO": "--oracle trained --objective grpo",
    "ranker's score, PPO": "--oracle trained --objective ppo",
    "ranker's order": "--oracle trained",
}
FILL = {
    "as many questions a step": "--fill 1",
    "filled up, at most 4 batches": "--fill 4 --num_steps {part}",
    "a quarter of the batch, filled up": "--fill 4 --batch_prompts {quarter}",
}


def rivals_study(folder: str, seeds: int, options: list[str], page_path: str, rates=RATES) -> str:
    """Trains every line of RIVALS with every seed at its own best rate; writes figures/rivals.svg, beside the
    page or in the folder, too."""
    table = study_at_best_rates("rivals_study", RIVALS, folder, seeds, options, page_path, rates)
    path = os.path.join(os.path.dirname(page_path) if page_path else folder, "figures", "rivals.svg")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_whole(path, curves(RIVALS, folder, seeds).encode())
    return table


def feedback_study(folder: str, seeds: int, options: list[str], page_path: str, rates=RATES) -> str:
    """Trains every line of FEEDBACK with every seed at its own best rate."""
    return study_at_best_rates("feedback_study", FEEDBACK, folder, seeds, options, page_path, rates)


def fill_study(folder: str, seeds: int, options: list[str], page_path: str) -> str:
    """Trains every line of FILL with every seed at the same rate."""
    asked = settings(options)
    blanks = {"part": asked["num_steps"] // 3, "quarter": asked["batch_prompts"] // 4}
    if blanks["quarter"] < 1:
        raise BadInput("fill: a quarter of --batch_prompts is a line of its own; give at least 4 behind --")
    check_looks("fill", asked["eval_every"], blanks["part"], "a third of --num_steps")
    begin("fill_study", folder, options, page_path)
    study = partial(rivals_table, FILL), folder, seeds, options, page_path
    return train_lines("fill_study", FILL, *study, **blanks)


def check_looks(name: str, every: int, steps: int, words: str) -> None:
    """The area under a curve needs two evaluations, the first of which is made at the start."""
    if steps < 1:
        raise BadInput(f"{name}: {words} are {steps} steps; give more --num_steps behind --")
    if not 1 <= every <= steps:
        raise BadInput(f"{name}: needs --eval_every N, from 1 to {words} ({steps}); give both behind --")


def study_at_best_rates(
    name: str, lines: dict[str, str], folder: str, seeds: int, options: list[str], page_path: str, rates
) -> str:
    """Trains every line with every seed, at the one of `rates` that gives it the largest mean `area` on
    RATE_SEEDS; of a single rate nothing is tried. What was found is kept in DIR/rates.json."""
    asked, rates = settings(options), [f"{rate:g}" for rate in rates]
    check_looks(name, asked["eval_every"], asked["num_steps"], "--num_steps")
    begin(name, folder, options, page_path, "--rates", *rates)
    best, found = dict.fromkeys(lines, rates[0]), {}
    for line, special in lines.items() if len(rates) > 1 else ():
        areas = {}
        for rate in rates:
            outs = [study_run(folder, f"{line} at {rate}", seed) for seed in RATE_SEEDS]
            for seed, out in zip(RATE_SEEDS, outs, strict=True):
                train_run(out, ["--seed", str(seed), *options, *special.split(), "--lr", rate])
            areas[rate] = fmean(area(looks(out)) for out in outs)
        found[line], best[line] = areas, max(areas, key=areas.get)
        write_json(os.path.join(folder, "rates.json"), found)
    lines = {line: f"{special} --lr {best[line]}" for line, special in lines.items()}
    return train_lines(name, lines, partial(rivals_table, lines), folder, seeds, options, page_path)


def looks(run: str, mode="sampled", wants=RUN_WANTS) -> list[tuple[int, float]]:
    """(step, accuracy) of a run's evaluations on held-out questions, the same in all runs."""
    path, points = os.path.join(run, "evaluations.jsonl"), []
    for where, row in read_jsonl(path, wants):
        accuracy = row[mode].get("accuracy") if isinstance(row.get(mode), dict) else None
        if not is_kind([row.get("step"), accuracy], list[int | float]):
            raise BadInput(f"{where}: no evaluation of {mode} answers; {wants}")
        points.append((row["step"], accuracy))
    if len({step for step, _ in points}) < 2:
        raise BadInput(f"{path}: not two evaluations; {wants}")
    return points


def area(points: list[tuple[int, float]]) -> float:
    """Mean height of the curve through these points: the area under it, a share of all steps."""
    whole = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    return whole / (points[-1][0] - points[0][0])


def numbers_of(run: str) -> dict[str, float]:
    """What the tables show of a run that has ended."""
    results, path = read_results(run, RUN_WANTS)[0], os.path.join(run, "metrics.jsonl")
    rows = [row for _, row in read_jsonl(path, RUN_WANTS)]
    rows = [{name: x for name, x in row.items() if is_kind(x, int | float)} for row in rows]
    if not rows or any(not row.keys() >= {"advantage_rms", "asked_groups"} for row in rows):
        raise BadInput(f"{path}: not a row of train.py for each step; {RUN_WANTS}")
    return {
        "before": 100 * results["before"]["sampled"]["accuracy"],
        "sampled": 100 * results["after"]["sampled"]["accuracy"],
        "greedy": 100 * results["after"]["greedy"]["accuracy"],
        "area": 100 * area(looks(run)),
        "rms": fmean(row["advantage_rms"] for row in rows),
        "kl": rows[-1].get("kl", 0.0),
        "asked": sum(row["asked_groups"] for row in rows),
        "seconds": sum(
            x for row in rows for name, x in row.items() if name.endswith("_s") and "per" not in name
        ),
    }


def paired(values: list[float], others: list[float]) -> str:
    """Mean of the differences, seed by seed, with its 95 % interval by Student's t."""
    gaps = [a - b for a, b in zip(values, others, strict=True)]
    if len(gaps) < 2:
        return f"{fmean(gaps):+.1f}"
    half = T_975[min(len(gaps) - 2, len(T_975) - 1)] * stdev(gaps) / len(gaps) ** 0.5
    return f"{fmean(gaps):+.1f} [{fmean(gaps) - half:+.1f}, {fmean(gaps) + half:+.1f}]"


def rivals_table(lines: dict[str, str], folder: str, seeds: int) -> str:
    """A row a line: means over the seeds, and the paired difference in area from the first line."""
    heads = ["learned by", "rate", "seeds", "sampled", "greedy", "area", "area against the first line"]
    heads += ["RMS of A", "KL", "groups asked", "seconds"]
    rows, first = [], None
    for name, options in lines.items():
        found = [numbers_of(run) for run in ended_runs(folder, name, seeds)]
        if not found:
            continue
        columns = {key: [one[key] for one in found] for key in found[0]}
        mean = {key: fmean(values) for key, values in columns.items()}
        first = first or columns["area"]
        against = paired(columns["area"], first[: len(found)]) if rows else ""
        cells = [name, options.partition("--lr ")[2] or "as given", str(len(found))]
        for key in ("sampled", "greedy"):
            cells.append(f"{mean[key]:.1f} [{min(columns[key]):.1f}, {max(columns[key]):.1f}]")
        cells += [f"{mean['area']:.1f}", against, f"{mean['rms']:.2f}", f"{mean['kl']:.2f}"]
        cells += [f"{mean['asked']:,.0f}", f"{mean['seconds']:,.0f}"]
        if not rows:
            rows.append(["nothing yet: the start", "", "", f"{mean['before']:.1f}", *[""] * 7])
        rows.append(cells)
    return markdown(heads, rows)


def curves(lines: dict[str, str], folder: str, seeds: int) -> str:
    """Sampled accuracy by step, the mean over the seeds with their range, a curve a line, as SVG. A curve
    ends with the first of its runs; its name says where, if another run went on (see --stop_after)."""
    series, heights = [], {}
    for name in lines:
        runs = [study_run(folder, name, seed) for seed in range(seeds)]
        heights[name] = [dict(looks(run)) for run in runs if os.path.exists(run)]
    last = max(step for found in heights.values() for height in found for step in height)
    for name, found in heights.items():
        points = mean_with_range(found)
        series.append((name if points[-1][0] == last else f"{name}, to step {points[-1][0]}", points))
    return page.figure(f"sampled accuracy by step, mean and range of {seeds} seeds", series)


def mean_with_range(heights: list[dict[int, float]]) -> list[tuple]:
    """(step, mean, lowest, highest) of curves {step: height}, at the steps that all of them have."""
    points = []
    for step in sorted(set.intersection(*map(set, heights))):
        at_step = [height[step] for height in heights]
        points.append((step, fmean(at_step), min(at_step), max(at_step)))
    return points
