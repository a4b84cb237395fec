"""What a run says in a terminal, while it runs and when it has ended."""

import math
import os
import shutil
import sys
from collections import Counter

from tqdm import tqdm

from plumbing.machine import fitted
from plumbing.options import BadInput, cell, is_kind, read_json, write_json

SILENT_STEPS = 5  # steps without any order of answers, after which the user is told what helps
NO_SIGNAL = (
    "note: in every group so far all answers tie, so there is nothing to learn from: the policy never samples"
    " a better answer. Raise --temperature and --group_size, or fine-tune the policy first (pretrain.py)"
)

FEW = 0.1  # share of groups with an order below which a run has learned from next to nothing
LITTLE_SIGNAL = (
    "note: hardly a group had an order to learn from; what helps: docs/questions.md, 'All groups are dead"
    " from the start'"
)


class Bar(tqdm):
    """The progress line of a run: step, accuracy, kl, dead and failed groups, time. It fits 80 columns. Where
    standard output is no terminal: a line for each tenth of the steps.
    board: TensorBoard's folder, which gets the numbers too, or ""."""

    def __init__(self, total: int, first: int, shown: bool, board: str = ""):
        layout = "step {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}, {rate_fmt}] {bar}"
        where = dict(disable=not shown or not sys.stdout.isatty(), file=sys.stdout, dynamic_ncols=True)
        super().__init__(total=total, initial=first, bar_format=layout, **where)
        self.numbers, self.board, self.steps = "", None, total
        if shown and board:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(board, purge_step=first)

    def show(self, step: int, numbers: dict):
        for name, value in numbers.items() if self.board else ():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, step)
        if self.board:
            self.board.flush()
        parts = [f"acc {100 * numbers['accuracy']:.1f}%"]
        parts += [f"kl {numbers['kl']:.3f}"] if numbers.get("kl") is not None else []
        parts += [f"dead {numbers['dead_groups']}", f"failed {numbers['failed_groups']}"]
        self.numbers = " ".join(parts)
        self.set_postfix_str(self.numbers, refresh=False)
        self.update(1)
        if not sys.stdout.isatty() and (step + 1) * 10 // self.steps > step * 10 // self.steps:
            print(f"step {step + 1}/{self.steps} {self.numbers}", flush=True)

    def doing(self, part: str):
        """Names the part of a step that is under way, in a terminal."""
        if sys.stdout.isatty():
            self.set_postfix_str(f"{self.numbers} {part}".strip())

    def help_without_signal(self, step: int):
        if step == min(SILENT_STEPS, self.steps) - 1:
            self.say(NO_SIGNAL)

    def say(self, line: str):
        """A line of its own, on stderr."""
        self.write(fitted(line), file=sys.stderr)


def evaluation_line(step: int, now: dict, first: dict) -> str:
    """One evaluation in words. now, first: `answers.summarize` of this one's and the first one's greedy
    answers. A category is named if it fell by more than chance explains (2.6 standard errors), the deepest
    fall first."""
    line = f"evaluated at step {step}: {100 * now['accuracy']:.1f} % of {now['n']} greedy answers are right"
    fallen = []
    for name, row in now["by_category"].items():
        old, new = first["by_category"][name]["accuracy"], row["accuracy"]
        middle = (old + new) / 2
        if old - new > 2.6 * math.sqrt(2 * middle * (1 - middle) / row["n"]):
            fallen.append((new - old, f"{name or '(none)'} {100 * old:.1f} -> {100 * new:.1f} %"))
    words = ", ".join(text for _, text in sorted(fallen))
    return f"{line}; WARNING, fell: {words}; does the oracle reward what is wrong?" if words else line


def for_terminal(table: str, width: int) -> str:
    """A Markdown table with padded columns. Where it is wider than the terminal, heads and intervals go on
    two lines, then the first column is cut, then columns go into a table of their own below."""
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    del rows[1]
    if sum(widths(rows)) + 2 * len(rows[0]) - 2 > width:
        rows = [line for row in rows for line in in_two(row, row is rows[0])]
    sizes = widths(rows)
    sizes[0] = min(sizes[0], max(20, width - sum(sizes[1:]) - 2 * len(sizes) + 2))
    tables = [[]]  # the columns of each
    for column in range(1, len(sizes)):
        if tables[-1] and sizes[0] + sum(sizes[i] + 2 for i in [*tables[-1], column]) > width:
            tables.append([])
        tables[-1].append(column)
    lines = []
    for columns in tables:
        for row in rows:
            first = row[0] if len(row[0]) <= sizes[0] else row[0][: sizes[0] - 1] + "~"
            cells = [first.ljust(sizes[0]), *(row[i].rjust(sizes[i]) for i in columns)]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def widths(rows: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def in_two(cells: list[str], is_head: bool) -> list[list[str]]:
    """A row of a table as one line, or as two: values, and below them their intervals; of heads two words."""
    split = [cell.partition(" " if is_head else " [") for cell in cells]
    second = [rest.rstrip("]").replace(", ", "..") for _, _, rest in split]
    return [[first for first, _, _ in split], second][: 1 + any(second)]


def show_table(table: str) -> None:
    """Prints a table in Markdown, padded in a terminal."""
    columns = shutil.get_terminal_size().columns
    print(for_terminal(table, columns) if sys.stdout.isatty() else table, flush=True)


def options_that_differ(configs: list[dict]) -> list[list]:
    """[option, its value in each run] for the options in config.json that are not the same in all."""
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [[name, *(config.get(name) for config in configs)] for name in names]
    own = ("made", "out", "resume")
    return [row for row in rows if row[0] not in own and any(value != row[1] for value in row[1:])]


def compare(folders: list[str]) -> str:
    """Runs side by side, a row a run: seed, accuracies before and after, gains with their intervals."""
    heads = ["run", "seed", "greedy before", "after", "gain", "sampled before", "after", "gain"]
    return markdown([*heads, "worst category", "s"], [read_results(folder)[1] for folder in folders])


def markdown(heads, rows) -> str:
    """A table in Markdown; each row has a cell for each head."""
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in [heads, *rows])
    return "\n".join([first, "|---" * len(heads) + "|", *others])


def read_results(folder: str, wants="name run folders whose training has ended") -> tuple[dict, list[str]]:
    """(results.json of a run that has ended, its row of `compare`). BadInput: it is missing or damaged."""
    path = os.path.join(folder, "results.json")
    results = read_json(path, wants)
    try:
        row = results_row(os.path.basename(folder.rstrip("/")), results)
        steps = [results["steps"], (results.get("kept") or {"step": 0})["step"]]
        if not is_kind(steps, list[int]):
            raise ValueError(f"steps {steps}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: not what train.py wrote ({error!r}); {wants}") from error
    return results, row


def results_row(name: str, r: dict) -> list[str]:
    """A run's row of `compare`, from its results.json."""
    cells = [cell(name), cell(r["seed"])]
    for mode in ("greedy", "sampled"):
        low, high = (f"{100 * x:+.1f}" for x in r["gain"][mode]["ci95"])
        cells += [f"{100 * r[when][mode]['accuracy']:.1f}" for when in ("before", "after")]
        cells.append(f"{100 * r['gain'][mode]['accuracy']:+.1f} [{low}, {high}]")
    old, new = (r[when]["greedy"]["by_category"] for when in ("before", "after"))
    change, worst = min((new[k]["accuracy"] - old[k]["accuracy"], k) for k in old)
    return [*cells, f"{cell(worst)} {100 * change:+.1f}", f"{r['wall_s']:.0f}"]


def differences(folders: list[str]) -> str:
    """The options in which runs differ, a row an option; "" where there is none."""
    names = [os.path.basename(folder.rstrip("/")) for folder in folders]
    configs = [read_json(os.path.join(folder, "config.json"), "name run folders") for folder in folders]
    rows = [[*map(cell, row)] for row in options_that_differ(configs)]
    return markdown(["option", *map(cell, names)], rows) if rows else ""


COUNTED = ("groups", "dead_groups", "failed_groups")


def oracle_summary(rows: list[dict]) -> dict:
    """What the oracle did over a whole run, from the rows of metrics.jsonl: sums, and means weighted by their
    counts. What is no number in a row is passed over."""
    causes = Counter()
    for row in rows:
        counts = row.get("failed_by_cause")
        counts = counts.items() if isinstance(counts, dict) else ()
        causes.update({cause: n for cause, n in counts if is_kind(n, int)})
    rows = [{name: x for name, x in row.items() if is_kind(x, int | float)} for row in rows]
    found = {name: sum(row.get(name, 0) for row in rows) for name in COUNTED}
    found["failed_by_cause"] = dict(causes)
    for name in ("judge_calls", "judge_cache_hits", "judge_tokens", "judge_repairs"):
        found |= {name: sum(row.get(name, 0) for row in rows)} if rows and name in rows[0] else {}
    for name, count in (("position_bias", "position_pairs"), ("canary_error", "canaries")):
        known = [row for row in rows if row.keys() >= {name, count}]
        if total := sum(row[count] for row in known):
            found[name] = sum(row[name] * row[count] for row in known) / total
    return found


def in_points(gain: dict) -> str:
    """A gain in accuracy in words."""
    low, high = (100 * x for x in gain["ci95"])
    return f"{100 * gain['accuracy']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"


def finish(run, device: str, after: dict, gain: dict, table: str) -> None:
    """Writes results.json and report.html of a run that has ended; prints its tables and gains."""
    from plumbing import report

    metrics, _ = report.sound_rows(os.path.join(run.out, "metrics.jsonl"), {"groups": int})
    kept = run.progress["best"] if run.options.keep == "best" else None
    results = {
        "seed": run.options.seed, "steps": run.step, "wall_s": round(run.wall_s(), 1),
        "device": device, "bad_steps": run.progress["bad_steps"], "before": run.progress["before"],
        "after": after, "gain": gain, "kept": kept, "oracle": oracle_summary(metrics),
    }  # fmt: skip
    write_json(os.path.join(run.out, "results.json"), results)
    print()
    show_table(table)
    for name, of_mode in gain.items():
        print(f"{name}: {in_points(of_mode)}")
    if kept:
        print(f"the adapter of step {kept['step']} is the best that was evaluated")
    oracle = results["oracle"]
    causes = ", ".join(f"{cause} {count}" for cause, count in oracle["failed_by_cause"].items())
    print(
        f"{oracle['groups']} groups of answers: {oracle['dead_groups']} tied throughout,"
        f" {oracle['failed_groups']} not ranked{causes and f' ({causes})'}"
    )
    if oracle["groups"] - oracle["dead_groups"] - oracle["failed_groups"] < FEW * oracle["groups"]:
        print(fitted(LITTLE_SIGNAL))
    if "judge_calls" in oracle:
        print(f"judge: {oracle['judge_calls']} calls, {oracle.get('judge_tokens', 0)} tokens")
    print(fitted(f"{results['wall_s']} s on {device}; results and adapter in {run.out}"))
    print(f"report: {report.write([run.out])}")
