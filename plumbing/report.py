"""A run as one page that needs nothing else: curves, tables, pictures, answers, options.

    python -m plumbing.report RUN [RUN ..] [--out FILE.html]     # also while a run is under way

It is written from the run folder's files: train.py writes it, too, when a run ends. Rows that cannot be read
are passed over and counted.
"""

import hashlib
import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass

from plumbing import page
from plumbing.options import (
    ArgumentParser,
    BadInput,
    is_kind,
    parse_json,
    read_bytes,
    read_json,
    run_script,
    write_whole,
)
from plumbing.progress import COUNTED, in_points, options_that_differ, oracle_summary, read_results

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
    ("Judge: calls, answers from the cache", ("judge_calls", "judge_cache_hits"), False),
    ("Judge: faults", ("position_bias", "canary_error"), False),
    ("Judge: agreement with itself", ("kendall_w",), True),
)  # fmt: skip


KINDS = {  # the fields that each row of a file has beside its step
    "metrics": dict.fromkeys(COUNTED, int),
    "rollouts": {
        "id": str, "question": str, "answer": str, "candidates": list[str],
        "oracle_ranks": list[int], "policy_ranks": list[int], "advantages": list[int | float],
    },
    "evaluations": {"greedy": dict},
    "answers": dict.fromkeys("id video category question gold greedy".split(), str) | {"right": bool},
}  # fmt: skip


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


def sound_rows(path: str, kinds: dict) -> tuple[list[dict], int]:
    """(rows of a JSONL file that have fields of these types and a step, number of the others). A last line
    without its end is being written, and is no row yet."""
    rows, broken, kinds = [], 0, {"step": int} | kinds
    content = read_bytes(path, RUN) if os.path.exists(path) else b""
    for line in content.splitlines(keepends=True):
        try:
            row = parse_json(line, path, RUN)
        except BadInput:
            row = None
        sound = is_kind(row, kinds)
        lengths = {len(row[name]) for name in kinds if isinstance(row[name], list)} if sound else ()
        if sound and len(lengths) < 2:  # a candidate is a column of all its row's lists
            rows.append(row)
        elif line.endswith(b"\n"):
            broken += 1
    return rows, broken


def read_run(folder: str) -> Run:
    """Raises BadInput if the folder is no run's."""
    config, read, broken = read_json(os.path.join(folder, "config.json"), RUN), {}, {}
    if not isinstance(config.get("made"), dict):
        raise BadInput(f"{folder}: no run, or one of an earlier version; {RUN}")
    for name, kinds in KINDS.items():
        read[name], count = sound_rows(os.path.join(folder, f"{name}.jsonl"), kinds)
        broken |= {f"{name}.jsonl": count} if count else {}
    log = os.path.join(folder, "sessions.log")
    results = read_results(folder)[0] if os.path.exists(os.path.join(folder, "results.json")) else {}
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
    rows, kept = sorted(run.answers, key=lambda row: row["step"]), run.results.get("kept")
    before = {row["id"]: row for row in rows if row["step"] == 0}
    later = [row for row in rows if (row["step"] == kept["step"] if kept else row["step"] > 0)]
    after = {row["id"]: row for row in later if row["id"] in before}
    return ({name: before[name] for name in after} or before), after


def points(rows: list[dict], name: str, most: int = 240) -> list[tuple]:
    """(step, value) of a number in metrics.jsonl. Of more than `most`, means of neighbours."""
    found = [(row["step"], row[name]) for row in rows if is_kind(row.get(name), int | float)]
    size = -(-len(found) // most)
    parts = [found[i : i + size] for i in range(0, len(found), size or 1)]
    return [tuple(sum(column) / len(part) for column in zip(*part, strict=True)) for part in parts]


# ---- parts of the page


def headline(run: Run) -> str:
    """What became of the run, in a few lines."""
    steps, config = max([row["step"] + 1 for row in run.metrics], default=0), run.config
    lines = [f"<h2>{page.text(run.name)}</h2>"]
    for mode, gain in run.results.get("gain", {}).items():
        old, new = (100 * run.results[when][mode]["accuracy"] for when in ("before", "after"))
        words = f"{old:.1f} % right before, {new:.1f} % after: {in_points(gain)}"
        lines.append(page.note(f"{mode} answers: {words}", ""))
    verdicts = [run.results.get(when, {}).get("greedy", {}).get("judged") for when in ("before", "after")]
    if all(verdicts):
        old, new = (verdict["accuracy"] for verdict in verdicts)
        words = f"{verdicts[1]['n']} open greedy answers by the judge's verdict"
        lines.append(page.note(f"{words}: {old:.1f} % right before, {new:.1f} % after", ""))
    if run.results:
        device = run.results.get("device", "a device it does not name")
        spent = f"{run.results['steps']} steps, {run.results['wall_s']:.0f} s on {device}"
        lines.append(page.note(f"{spent}, seed {config.get('seed')}"))
        if kept := run.results.get("kept"):
            lines.append(page.note(f"kept: the adapter of step {kept['step']} (--keep best)"))
    else:
        lines.append(page.note(f"under way, or broken off: {steps} steps of {config.get('num_steps')}"))
    for name, count in run.broken.items():
        lines.append(page.note(f"{name}: {count} broken row(s) passed over", "wrong"))
    return "".join(lines)


def accuracy_bars(run: Run) -> str:
    """Greedy accuracy before and after, all and by category, with intervals."""
    before, after = before_and_after(run)
    cards = []
    for category in ("all", *sorted({row["category"] for row in before.values()})):
        bars, count = bars_of(before, after, category)
        cards += [page.card(category or "(none)", bars, page.note(f"{count} questions"))] if count else []
    words = "Greedy answers to held-out questions. Whiskers: 95 % intervals, a video's questions together."
    return page.section("Before and after", words, cards)


def bars_of(before: dict, after: dict, category: str = "all") -> tuple[str, int]:
    """(bars of greedy accuracy before and after, number of questions) of a category."""
    bars, count = [], 0
    for label, color, rows in (("before", "var(--was)", before), ("after", "var(--now)", after)):
        chosen = [row for row in rows.values() if category in ("all", row["category"])]
        bars += [(label, *share(chosen), color)] if chosen else []
        count = max(count, len(chosen))
    return page.share_bars(bars), count


def curves(runs: list[Run]) -> str:
    """Of one run a chart has a colour for each metric; of several, one for each run and its first metric."""
    held = [(run.name if len(runs) > 1 else "held-out, greedy", evaluation_points(run)) for run in runs]
    cards = [page.chart("Held-out accuracy", held, percent=True)]
    for title, names, percent in CHARTS:
        if len(runs) == 1:
            series = [(name, points(runs[0].metrics, name)) for name in names]
        else:
            series = [(run.name, points(run.metrics, names[0])) for run in runs]
            title = f"{title} ({names[0]})" if len(names) > 1 else title
        cards.append(page.chart(title, series, percent))
    return page.section("Learning curves", "docs/metrics.md says what each number is.", cards)


def evaluation_points(run: Run) -> list[tuple]:
    """(step, accuracy, low, high) of the greedy answers: before, while it ran, after."""
    found = {row["step"]: row["greedy"] for row in run.evaluations}
    if run.results:
        ends = {0: "before", run.results["steps"]: "after"}
        found |= {step: run.results[when]["greedy"] for step, when in ends.items()}
    kinds, sound = {"accuracy": int | float, "ci95": list[int | float]}, []
    for step, of in sorted(found.items()):
        if is_kind(of, kinds) and len(of["ci95"]) == 2:
            sound.append((step, of["accuracy"], *of["ci95"]))
    return sound


def strip_path(folder: str, name: str) -> str:
    """Where the pictures of a question lie. Ids may hold anything, so the file's name is a hash."""
    return os.path.join(folder, "frames", hashlib.sha256(str(name).encode()).hexdigest()[:16] + ".jpg")


def strip(run: Run, name: str) -> str:
    path = strip_path(run.folder, name)
    content = read_bytes(path, RUN) if os.path.exists(path) else b""
    is_jpeg = content.startswith(b"\xff\xd8")
    return page.picture(content, f"frames of the video of question {name}") if is_jpeg else ""


def dozen_of(rows: list) -> list:
    """A dozen of them at most, evenly spread."""
    return rows[:: -(-len(rows) // CARDS)] if rows else []


def prompts(run: Run) -> str:
    """A dozen prompts of several steps with pictures, answers, the oracle's order and the advantages."""
    pictured = [row for row in run.rollouts if os.path.exists(strip_path(run.folder, row["id"]))]
    shown, cards = dozen_of(pictured or run.rollouts), []
    largest = max((abs(a) for row in shown for a in row["advantages"]), default=0)
    for row in shown:
        columns = (row[k] for k in ("oracle_ranks", "policy_ranks", "advantages", "candidates"))
        best_first = sorted(zip(*columns, strict=True), key=lambda answer: answer[:2])
        rows = [[text, r, p, f"{a:+.3f}", page.advantage_bar(a, largest)] for r, p, a, text in best_first]
        heads = ["answer", "oracle", "policy", "advantage", ""]
        gold = page.note(f"right answer: {row['answer']} {row.get('note') or ''}")
        table = page.table(heads, rows, right=(1, 2, 3))
        cards.append(page.card(f"Step {row['step']}: {row['question']}", strip(run, row["id"]), gold, table))
    words = "Ranks: 0 is best, equal answers tie. Green is reinforced, red is pushed down."
    words += " A group that ties throughout teaches nothing."
    return page.section("What it was taught", words, cards)


def changed_answers(run: Run) -> str:
    before, after = before_and_after(run)
    pairs, cards = [(before[name], row) for name, row in after.items()], []
    for title, was in (("From wrong to right", False), ("From right to wrong", True)):
        found = [(old, new) for old, new in pairs if old["right"] is was and new["right"] is not was]
        rows = [[old["question"], old["greedy"], new["greedy"], old["gold"]] for old, new in dozen_of(found)]
        table = page.table(["question", "before", "after", "right answer"], rows)
        table = table if rows else page.note("none")
        part = f", {len(rows)} of them shown" if len(rows) < len(found) else ""
        cards.append(page.card(f"{title}: {len(found)} of {len(after)}{part}", table))
    return page.section("Answers that changed", "", cards if after else [])


def configuration(run: Run) -> str:
    given = [name for name in re.findall(r"--(\w+)", run.sessions) if name in run.config]
    options = {name: run.config[name] for name in [*given, *run.config] if name != "made"}  # given ones first
    made = {}
    for name, value in run.config["made"].items():  # versions of packages, fingerprints: a row each
        made |= (
            {f"{name}: {key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
        )
    tables = {"The oracle": oracle_summary(run.metrics), "Made with": made, "Options": options}
    cards = [page.card(title, page.table(["", ""], list(of.items()))) for title, of in tables.items()]
    cards.append(page.card("Sessions", *map(page.note, run.sessions.splitlines())))
    return page.section("How it was made", "", cards)


def comparison(runs: list[Run]) -> str:
    """Several runs: accuracies beside each other, and the options that differ."""
    cards = []
    for run in runs:
        bars, count = bars_of(*before_and_after(run))
        cards += [page.card(run.name, bars)] if count else []
    rows = options_that_differ([run.config for run in runs])
    unlike = page.table(["option", *(run.name for run in runs)], rows) if rows else page.note("none")
    return page.section("Side by side", "", cards) + "<h2>Options that differ</h2>" + unlike


def html(folders: list[str]) -> str:
    """The page of one run, or of several."""
    runs = [read_run(folder) for folder in folders]
    title = ", ".join(run.name for run in runs)
    parts = [f"<h1>Oracle-RLAIF: {page.text(title)}</h1>"]
    parts += [comparison(runs), curves(runs)] if len(runs) > 1 else []
    for run in runs:
        own = curves([run]) if len(runs) == 1 else ""
        parts += [headline(run), accuracy_bars(run), own, prompts(run), changed_answers(run)]
        parts.append(configuration(run))
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
