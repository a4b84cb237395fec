"""report.html of hand-made run folders: what it says, that it escapes, and how Chromium shows it."""

import io
import json
import os
import re
import shutil
import subprocess

import pytest
from PIL import Image

from plumbing import page, progress, report

ALERT = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer_rows(step, right):
    same = {"step": step, "category": "Color", "gold": "red", "sampled": ["red"]}
    return [
        same
        | {"id": f"q{i}", "video": f"v{i // 2}.mp4", "question": f"color {i}?"}
        | {"greedy": "red" if ok else "blue", "right": ok}
        for i, ok in enumerate(right)
    ]


def make_run(folder, ended=True, **options):
    """A run folder of three steps; two questions become right and one becomes wrong."""
    (folder / "frames").mkdir(parents=True)
    config = {"seed": 3, "num_steps": 3, "lr": 0.001, "out": str(folder), "made": {"torch": "2"}} | options
    (folder / "config.json").write_text(json.dumps(config))
    numbers = {"accuracy": 0.5, "kl": 0.1, "entropy": 0.4, "dead_groups": 1, "failed_groups": 0, "groups": 8}
    lines(folder / "metrics.jsonl", [{"step": i, **numbers, "sampling_s": 1.0 + i} for i in range(3)])
    group = {"candidates": ["red", ALERT], "oracle_ranks": [0, 1], "policy_ranks": [1, 0]}
    group |= {"id": "q/0", "question": "color?", "answer": "red", "advantages": [0.25, -0.25]}
    lines(folder / "rollouts.jsonl", [{"step": i, **group} for i in range(3)])
    before, after = [False, False, True, True], [True, True, False, True]
    lines(folder / "answers.jsonl", [*answer_rows(0, before), *answer_rows(3, after)])
    picture = io.BytesIO()
    Image.new("RGB", (96, 16), "red").save(picture, "JPEG")
    with open(report.strip_path(str(folder), "q/0"), "wb") as file:
        file.write(picture.getvalue())
    part = {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 4, "by_category": {"Color": {"accuracy": 0.5, "n": 4}}}
    gain = {mode: {"accuracy": 0.25, "ci95": [0.2, 0.3]} for mode in ("greedy", "sampled")}
    both = {"greedy": part, "sampled": part}
    results = {
        "before": both,
        "after": both,
        "gain": gain,
        "steps": 3,
        "wall_s": 9.0,
        "device": "CPU",
        "seed": 3,
    }
    if ended:
        (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_the_page_tells_gains_changed_answers_and_what_was_taught(tmp_path):
    html = report.html([make_run(tmp_path / "a")])
    for words in ("+25.0 points", "From wrong to right: 2 of 4", "From right to wrong: 1 of 4", "color 2?"):
        assert words in html, words
    assert html.count("data:image/jpeg;base64,") == 3 and html.count('aria-label="advantage -0.250"') == 3
    assert ALERT not in html and page.escape(ALERT) in html
    assert not re.search(r"<script|https?:|<link|@import", html)


def test_the_options_that_were_given_stand_first_and_every_chart_is_named(tmp_path):
    folder = make_run(tmp_path / "a", made={"torch": "2", "packages": {"av": "14"}})
    (tmp_path / "a" / "sessions.log").write_text("2026-01-01 10:00:00  train.py --lr 0.001 --out a\n")
    html = report.html([folder])
    options = re.findall(r"<tr><td>(\w+)</td>", html.split("<h3>Options</h3>")[1])
    assert options == ["lr", "out", "seed", "num_steps"]
    assert "<td>packages: av</td><td>14</td>" in html
    assert html.count("<svg") == html.count("aria-label")


def test_broken_rows_are_passed_over_and_counted_and_a_row_under_way_is_none(tmp_path):
    run = make_run(tmp_path / "a", ended=False)
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write(
            'not JSON\n{"step": NaN}\n[1]\n{"accuracy": 1}\n{"step": 3, "accuracy": "half"}\n{"step": 4, "acc'
        )
    html = report.html([run])
    assert (
        "metrics.jsonl: 5 broken row(s) passed over" in html
        and "under way, or broken off: 3 steps of 3" in html
    )


@pytest.mark.parametrize("value", ["1", None, [], {}, {"a": "b"}, True, [0.1, "0.2"]])
def test_numbers_that_are_none_are_passed_over_in_sums_and_curves(tmp_path, value):
    row = {"groups": 8, "dead_groups": 1, "failed_groups": 2, "failed_by_cause": {"cut": 2}, "judge_calls": 3}
    row |= {"judge_tokens": 5, "position_bias": 0.5, "position_pairs": 4}
    wanted = progress.oracle_summary([row])
    assert wanted["position_bias"] == 0.5 and wanted["failed_by_cause"] == {"cut": 2}
    for name in row:
        found = progress.oracle_summary([row, row | {name: value}])
        assert found["groups"] == (8 if name == "groups" else 16)
        assert found["failed_by_cause"] == {"cut": 2 if name == "failed_by_cause" else 4}
        assert found["position_bias"] == 0.5 and found["judge_calls"] == (3 if name == "judge_calls" else 6)
    make_run(tmp_path / "run")
    sound = {"accuracy": 0.5, "ci95": [0.4, 0.6]}
    rows = [sound, sound | {"accuracy": value}, sound | {"ci95": value}, {}]
    lines(
        tmp_path / "run" / "evaluations.jsonl", [{"step": i + 1, "greedy": of} for i, of in enumerate(rows)]
    )
    points = report.evaluation_points(report.read_run(str(tmp_path / "run")))
    assert [step for step, *_ in points] == [0, 1, 3]
    assert report.html([str(tmp_path / "run")])


def test_several_runs_stand_side_by_side_with_the_options_that_differ(tmp_path):
    runs = [make_run(tmp_path / name, lr=lr) for name, lr in (("a", 0.001), ("b", 0.002))]
    html = report.html(runs)
    table = html.split("Options that differ")[1].split("</table>")[0]
    assert re.findall(r"<td>(.*?)</td>", table) == ["lr", "0.001", "0.002"]
    assert progress.differences(runs).splitlines()[-1] == "| lr | 0.001 | 0.002 |"


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_that_is_no_run_is_one_line_and_status_2(tmp_path, script, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    done = script(report.main, "report", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr


def test_the_interval_of_a_category_takes_the_questions_of_a_video_together():
    """Two videos, one all right, one all wrong: mean 0.5, spread 1.96 sqrt(1 + 1) / 4 = 0.693."""
    mean, (low, high) = report.share(answer_rows(0, [True, True, False, False]))
    assert (mean, high - mean, mean - low) == pytest.approx((0.5, 0.693, 0.693), abs=1e-3)


def test_tables_fit_a_terminal():
    heads = "| category | n | greedy before | greedy after | sampled before | sampled after |"
    cell = "70.5 [69.1, 72.0]"
    table = f"{heads}\n|---|---|---|---|---|---|\n| **all** | 2955 | {cell} | {cell} | {cell} | {cell} |"
    wide, narrow = progress.for_terminal(table, 200), progress.for_terminal(table, 80)
    assert len(wide.splitlines()) == 2 and max(map(len, narrow.splitlines())) <= 80
    assert narrow.splitlines()[0].split() == ["category", "n", "greedy", "greedy", "sampled", "sampled"]
    assert narrow.splitlines()[2].split() == ["all", "2955", *["70.5"] * 4]
    assert narrow.splitlines()[3].split() == ["69.1..72.0"] * 4
    long = table + f"\n| {'x' * 90} | 1 | 1 | 1 | 1 | 1 |"
    assert max(map(len, progress.for_terminal(long, 80).splitlines())) <= 80
    many = f"| run |{' gain |' * 9}\n{'|---' * 10}|\n| a |{f' {cell} |' * 9}"
    assert max(map(len, progress.for_terminal(many, 80).splitlines())) <= 80


@pytest.mark.skipif(not CHROMIUM, reason="no chromium; on Debian: apt-get install chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_chromium_shows_pictures_curves_and_text_and_no_error(tmp_path, width):
    """Measured by a script of a page around it: the report itself holds none."""
    path = report.write([make_run(tmp_path / "a")])
    measure = """<script>
      const size = e => { const b = e.getBoundingClientRect(); return b.width > 10 && b.height > 5 };
      const frame = document.querySelector("iframe");
      frame.onload = () => {
        const inside = frame.contentDocument, all = s => [...inside.querySelectorAll(s)];
        document.title = JSON.stringify({ img: all("img").map(e => size(e) && e.naturalWidth > 0),
          svg: all("svg").map(size), curves: all(".curve").map(e => e.getTotalLength() > 20),
          over: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
          scripts: all("script").length });
      };
    </script>"""
    content = page.escape(open(path).read())
    frame = (
        f'<title></title><iframe style="width:{width}px;height:900px;border:0" srcdoc="{content}"></iframe>'
    )
    (tmp_path / "measured.html").write_text(frame + measure)

    def chromium(name):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
        command += [
            f"--user-data-dir={tmp_path}/profile",
            "--enable-logging=stderr",
            "--dump-dom",
            f"file://{name}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
        assert ":CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    assert ALERT.replace("<", "&lt;").replace(">", "&gt;") in chromium(path)
    title = re.search(r"<title>(.*?)</title>", chromium(tmp_path / "measured.html"))[1]
    found = json.loads(title.replace("&quot;", '"'))
    assert len(found["img"]) == 3 and all(found["img"]) and len(found["curves"]) >= 5 and all(found["curves"])
    assert len(found["svg"]) > 10 and all(found["svg"]) and found["over"] == 0 and found["scripts"] == 0


def test_results_that_name_no_device_are_shown(tmp_path):
    run = make_run(tmp_path / "a")
    results = json.loads(open(f"{run}/results.json").read())
    (tmp_path / "a" / "results.json").write_text(
        json.dumps({k: x for k, x in results.items() if k != "device"})
    )
    assert "3 steps, 9 s on a device it does not name" in report.html([run])
