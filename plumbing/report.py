"""A run as one page that needs nothing else: curves, tables, pictures, answers, options.

    python -m plumbing.report RUN [RUN ..] [--out FILE.html]     # also while a run is under way

It is written from the run folder's files: train.py writes it, too, when a run ends. Rows that cannot be read
are passed over and counted.
"""

import hashlib
import math
import os
from collections import defaultdict
from dataclasses import dataclass

from plumbing import page
from plumbing.options import (
    ArgumentParser,
    BadInput,
    parse_json,
    read_bytes,
    read_json,
    run_script,
    write_whole,
)
from plumbing.progress import options_that_differ, oracle_summary

RUN = "name a folder that train.py made"
CARDS = 12  # prompts that are shown with their candidates, and changed answers of a kind
CHARTS = (  # title, names in metrics.jsonl, whether they are shares in 0..1
    ("Accuracy of the sampled answers", ("accuracy", "oracle_best_accuracy"), True),
    ("KL to the reference, nats a token", ("kl",), False),
    ("Entropy, nats a token", ("entropy",), False),
    ("Groups without signal", ("dead_groups", "failed_groups"), False),
    ("Agreement of policy and oracle", ("kendall_tau", "ndcg"), False),
    ("Root mean square of the advantages", ("advantage_rms",), False),
    ("Gradient norm", ("grad_norm",), False),
    ("Clipped tokens", ("clip_frac",), True),
    ("Tokens of an answer", ("mean_tokens",), False),
    ("Seconds of a step by part", ("sampling_s", "oracle_s", "reference_s", "update_s"), False),
    ("Dual reward", ("reward_discrete", "reward_continuous", "reward_format"), False),
    ("Judge: calls, from the cache, asked again", ("judge_calls", "judge_cache_hits", "judge_repairs"), False),
    ("Judge: faults", ("position_bias", "canary_error"), False),
    ("Judge: agreement with itself", ("kendall_w",), True),
)  # fmt: skip


@dataclass
class Run:
    """What a run folder holds, of a run that has ended or is under way."""

    folder: str
    config: dict
    metrics: list[dict]
    rollouts: list[dict]
    answers: list[dict]
    evaluations: list[dict]
    results: dict  # empty while the run is under way
    sessions: str
    broken: dict[str, int]  # rows that cannot be read, by file

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.folder))


def sound_rows(path: str, needs: tuple) -> tuple[list[dict], int]:
    """(rows of a JSONL file that have these fields, number of the others). A last line without its end is
    being written, and is no row yet."""
    rows, broken = [], 0
    if not os.path.exists(path):
        return rows, broken
    for line in read_bytes(path, RUN).splitlines(keepends=True):
        try:
            row = parse_json(line, path, RUN)
            sound = isinstance(row, dict) and row.keys() >= set(needs) and is_number(row["step"])
        except BadInput:
            sound = False
        if sound:
            rows.append(row)
        elif line.endswith(b"\n"):
            broken += 1
    return rows, broken


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def read_run(folder: str) -> Run:
    """Raises BadInput if the folder is no run's."""
    config, read, broken = read_json(os.path.join(folder, "config.json"), RUN), {}, {}
    if "made" not in config:
        raise BadInput(f"{folder}: no run, or one of an earlier version; {RUN}")
    candidates = ("id", "question", "answer", "candidates", "oracle_ranks", "policy_ranks", "advantages")
    for name, needs in (
        ("metrics", ()), ("rollouts", candidates), ("evaluations", ("greedy",)),
        ("answers", ("id", "video", "category", "question", "gold", "greedy", "right")),
    ):  # fmt: skip
        read[name], count = sound_rows(os.path.join(folder, f"{name}.jsonl"), ("step", *needs))
        broken |= {f"{name}.jsonl": count} if count else {}
    path, log = os.path.join(folder, "results.json"), os.path.join(folder, "sessions.log")
    results = read_json(path, RUN) if os.path.exists(path) else {}
    sessions = read_bytes(log, RUN).decode(errors="replace") if os.path.exists(log) else ""
    return Run(folder, config, **read, results=results, sessions=sessions, broken=broken)


# ---- numbers


def share(rows: list[dict]) -> tuple[float, tuple[float, float]]:
    """Share of right greedy answers and its 95 % interval, normal, with questions of one video together."""
    mean, off = sum(row["right"] for row in rows) / len(rows), defaultdict(float)
    for row in rows:
        off[row["video"]] += row["right"] - mean
    spread = 1.96 * math.sqrt(sum(x * x for x in off.values())) / len(rows)
    return mean, (mean - spread, mean + spread)


def before_and_after(run: Run) -> tuple[dict, dict]:
    """The answers of the first and of the last evaluation, as {id: row}; those asked in both."""
    rows = sorted(run.answers, key=lambda row: row["step"])
    before = {row["id"]: row for row in rows if row["step"] == 0}
    after = {row["id"]: row for row in rows if row["step"] > 0 and row["id"] in before}
    return ({name: before[name] for name in after} or before), after


def points(rows: list[dict], name: str) -> list[tuple]:
    return [(row["step"], row[name]) for row in rows if is_number(row.get(name))]


# ---- parts of the page


def headline(run: Run) -> str:
    """What became of the run, in a few lines."""
    steps = max([row["step"] + 1 for row in run.metrics], default=0)
    lines = [f"<h2>{page.text(run.name)}</h2>"]
    if run.results:
        for mode, gain in run.results["gain"].items():
            old, new = (100 * run.results[when][mode]["accuracy"] for when in ("before", "after"))
            low, high = (100 * x for x in gain["ci95"])
            words = (
                f"{old:.1f} % right before, <b>{new:.1f} %</b> after: {100 * gain['accuracy']:+.1f} points"
            )
            lines.append(
                f"<p>{page.text(mode)} answers: {words}, 95 % interval {low:+.1f} to {high:+.1f}</p>"
            )
        lines.append(
            f'<p class="dim">{run.results["steps"]} steps, {run.results["wall_s"]:.0f} s on'
            f" {page.text(run.results['device'])}, seed {page.text(run.config.get('seed'))}</p>"
        )
    else:
        lines.append(
            f'<p class="dim">under way, or broken off: {steps} steps of {page.text(run.config.get("num_steps"))}</p>'
        )
    for name, count in run.broken.items():
        lines.append(f'<p class="wrong">{page.text(name)}: {count} broken row(s) passed over</p>')
    return "".join(lines)


def accuracy_bars(run: Run) -> str:
    """Greedy accuracy before and after, all and by category, with intervals."""
    before, after = before_and_after(run)
    if not before:
        return ""
    cards = []
    for category in ("all", *sorted({row["category"] for row in before.values()})):
        bars = []
        for name, color, rows in (("before", "var(--was)", before), ("after", "var(--now)", after)):
            chosen = [row for row in rows.values() if category in ("all", row["category"])]
            bars += [(name, *share(chosen), color)] if chosen else []
        count = sum(category in ("all", row["category"]) for row in before.values())
        cards.append(
            f'<div class="card"><h3>{page.text(category or "(none)")}</h3>{page.share_bars(bars)}<p class="dim">{count} questions</p></div>'
        )
    words = "Greedy answers to held-out questions. Whiskers: 95 % intervals, questions of one video taken together."
    return f'<h2>Before and after</h2><p class="dim">{words}</p><div class="grid">{"".join(cards)}</div>'


def curves(runs: list[Run]) -> str:
    """Of one run a chart has a colour for each metric; of several, one for each run and its first metric."""
    held = [(run.name if len(runs) > 1 else "held-out, greedy", evaluation_points(run)) for run in runs]
    cards = [page.chart("Held-out accuracy", [], held, percent=True)]
    for title, names, percent in CHARTS:
        if len(runs) == 1:
            series = [(name, points(runs[0].metrics, name)) for name in names]
        else:
            series = [(run.name, points(run.metrics, names[0])) for run in runs]
            title = f"{title} ({names[0]})" if len(names) > 1 else title
        cards.append(page.chart(title, [(name, of) for name, of in series if of], percent=percent))
    return f'<h2>Learning curves</h2><div class="grid">{"".join(cards)}</div>'


def evaluation_points(run: Run) -> list[tuple]:
    """(step, accuracy, low, high) of the greedy answers: before, while it ran, after."""
    found = {row["step"]: row["greedy"] for row in run.evaluations}
    if run.results:
        found |= {0: run.results["before"]["greedy"], run.results["steps"]: run.results["after"]["greedy"]}
    return [(step, of["accuracy"], *of["ci95"]) for step, of in sorted(found.items())]


def strip_path(folder: str, name: str) -> str:
    """Where the pictures of a question lie. Ids may hold anything, so the file's name is a hash."""
    return os.path.join(folder, "frames", hashlib.sha256(str(name).encode()).hexdigest()[:16] + ".jpg")


def strip(run: Run, name: str) -> str:
    path = strip_path(run.folder, name)
    content = read_bytes(path, RUN) if os.path.exists(path) else b""
    return (
        page.picture(content, f"frames of the video of question {name}") if content[:2] == b"\xff\xd8" else ""
    )


def prompts(run: Run) -> str:
    """A dozen prompts of several steps with pictures, answers, the oracle's order and the advantages."""
    shown = [row for row in run.rollouts if os.path.exists(strip_path(run.folder, row["id"]))] or run.rollouts
    shown = shown[:: -(-len(shown) // CARDS)] if shown else []
    largest = max((abs(a) for row in shown for a in row["advantages"]), default=0)
    cards = []
    for row in shown:
        best_first = sorted(
            zip(row["oracle_ranks"], row["policy_ranks"], row["advantages"], row["candidates"], strict=True),
            key=lambda x: x[:2],
        )
        rows = [[text, r, p, f"{a:+.3f}", page.advantage_bar(a, largest)] for r, p, a, text in best_first]
        cards.append(
            f'<div class="card">{strip(run, row["id"])}<h3>Step {row["step"]}: {page.text(row["question"])}</h3>'
            f'<p class="dim">right answer: {page.text(row["answer"])} {page.text(row.get("note") or "")}</p>'
            f"{page.table(['answer', 'oracle', 'policy', 'advantage', ''], rows, right=(1, 2, 3))}</div>"
        )
    words = "Ranks: 0 is best, equal answers tie. Green is reinforced, red is pushed down; a group that ties throughout teaches nothing."
    return (
        f'<h2>What it was taught</h2><p class="dim">{words}</p><div class="grid">{"".join(cards)}</div>'
        if cards
        else ""
    )


def changed_answers(run: Run) -> str:
    before, after = before_and_after(run)
    parts = []
    for title, was in (("From wrong to right", False), ("From right to wrong", True)):
        found = [
            (before[k], row)
            for k, row in after.items()
            if before[k]["right"] is was and row["right"] is not was
        ]
        rows = [
            [old["question"], old["greedy"], new["greedy"], old["gold"]]
            for old, new in found[:: -(-len(found) // CARDS) or 1]
        ]
        body = (
            page.table(["question", "before", "after", "right answer"], rows)
            if rows
            else '<p class="dim">none</p>'
        )
        parts.append(f'<div class="card"><h3>{title}: {len(found)} of {len(after)}</h3>{body}</div>')
    return f'<h2>Answers that changed</h2><div class="grid">{"".join(parts)}</div>' if after else ""


def configuration(run: Run) -> str:
    made = run.config["made"]
    options = [[name, value] for name, value in run.config.items() if name != "made"]
    oracle = [[name, value] for name, value in oracle_summary(run.metrics).items()]
    parts = [
        f'<div class="card"><h3>{title}</h3>{page.table(["", ""], rows)}</div>'
        for title, rows in (
            ("The oracle", oracle),
            ("Made with", [[k, v] for k, v in made.items()]),
            ("Options", options),
        )
    ]
    parts.append(
        f'<div class="card"><h3>Sessions</h3>{"".join(f"<p>{page.text(line)}</p>" for line in run.sessions.splitlines())}</div>'
    )
    return f'<h2>How it was made</h2><div class="grid">{"".join(parts)}</div>'


def comparison(runs: list[Run]) -> str:
    """Several runs: accuracies beside each other, and the options that differ."""
    names, bars = [run.name for run in runs], []
    for run in runs:
        before, after = before_and_after(run)
        rows = [("before", "var(--was)", before), ("after", "var(--now)", after)]
        of = [(label, *share(list(answers.values())), color) for label, color, answers in rows if answers]
        bars.append(
            f'<div class="card"><h3>{page.text(run.name)}</h3>{page.share_bars(of)}</div>' if of else ""
        )
    rows = [[name, *values] for name, values in options_that_differ([run.config for run in runs]).items()]
    unlike = page.table(["option", *names], rows) if rows else '<p class="dim">no option differs</p>'
    return f'<h2>Side by side</h2><div class="grid">{"".join(bars)}</div><h2>Options that differ</h2>{unlike}'


def html(folders: list[str]) -> str:
    """The page of one run, or of several."""
    runs = [read_run(folder) for folder in folders]
    title = ", ".join(run.name for run in runs)
    parts = [f"<h1>Oracle-RLAIF: {page.text(title)}</h1>"]
    parts += [comparison(runs), curves(runs)] if len(runs) > 1 else []
    for run in runs:
        own = [curves([run])] if len(runs) == 1 else []
        parts += [
            headline(run),
            accuracy_bars(run),
            *own,
            prompts(run),
            changed_answers(run),
            configuration(run),
        ]
    return page.page(title, parts)


def write(folders: list[str], out: str = "") -> str:
    """Writes the page into `out`, or into the first run's folder; returns its path."""
    path = out or os.path.join(folders[0], "report.html")
    write_whole(path, html(folders).encode(errors="replace"))
    return path


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", default="", help="the page's file (report.html in the first run's folder)")
    args = parser.parse_args()
    print(f"report: {write(args.runs, args.out)}")
    return 0


if __name__ == "__main__":
    run_script(main)
