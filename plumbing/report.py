"""What a run says while it runs and when it has ended."""

import json
import os
import sys
from collections import Counter

from tqdm import tqdm


class Bar:
    """The progress line of a run: step, accuracy, kl, dead and failed groups, time. It fits 80 columns."""

    def __init__(self, total: int, first: int, shown: bool):
        layout = "step {n_fmt}/{total_fmt} {postfix} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
        self.total = total
        self.bar = tqdm(
            total=total, initial=first, disable=not shown, file=sys.stdout, bar_format=layout,
            dynamic_ncols=True,
        )  # fmt: skip

    def show(self, numbers: dict):
        parts = [f"acc {100 * numbers['accuracy']:.1f}%"]
        parts += [f"kl {numbers['kl']:.3f}"] if numbers.get("kl") is not None else []
        parts += [f"dead {numbers['dead_groups']}", f"failed {numbers['failed_groups']}"]
        self.bar.set_postfix_str(" ".join(parts))
        self.bar.update(1)

    def say(self, line: str):
        """A line of its own, on stderr."""
        tqdm.write(line, file=sys.stderr)

    def close(self):
        self.bar.close()


def oracle_summary(folder: str) -> dict:
    """What the oracle did over a whole run, from metrics.jsonl: sums, and means weighted by their counts."""
    path, rows, causes = os.path.join(folder, "metrics.jsonl"), [], Counter()
    if os.path.exists(path):  # a run without a step has none
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    for row in rows:
        causes.update(row.get("failed_by_cause", {}))
    found = {name: sum(row[name] for row in rows) for name in ("groups", "dead_groups", "failed_groups")}
    found["failed_by_cause"] = dict(causes)
    for name in ("judge_calls", "judge_cache_hits", "judge_tokens", "judge_repairs"):
        found |= {name: sum(row[name] for row in rows)} if rows and name in rows[0] else {}
    for name, count in (("position_bias", "position_pairs"), ("canary_error", "canaries")):
        total = sum(row.get(count, 0) for row in rows)
        found |= {name: sum(row[name] * row[count] for row in rows if count in row) / total} if total else {}
    return found


def finish(run, device: str, after: dict, gain: dict, table: str) -> dict:
    """The content of results.json of a run that has ended. Prints its tables and gains."""
    results = {
        "seed": run.options.seed, "steps": run.options.num_steps, "wall_s": round(run.wall_s(), 1),
        "device": device, "bad_steps": run.progress["bad_steps"], "before": run.progress["before"],
        "after": after, "gain": gain, "oracle": oracle_summary(run.out),
    }  # fmt: skip
    print("\n" + table)
    for name, g in gain.items():
        low, high = (100 * x for x in g["ci95"])
        print(f"{name}: {100 * g['accuracy']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}")
    oracle = results["oracle"]
    causes = ", ".join(f"{cause} {count}" for cause, count in oracle["failed_by_cause"].items())
    print(
        f"{oracle['groups']} groups of answers: {oracle['dead_groups']} tied throughout,"
        f" {oracle['failed_groups']} not ranked{causes and f' ({causes})'}"
    )
    if "judge_calls" in oracle:
        print(f"judge: {oracle['judge_calls']} calls, {oracle['judge_tokens']} tokens")
    print(f"{results['wall_s']} s on {device}; results and adapter in {run.out}")
    return results
