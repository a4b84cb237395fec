"""README's pictures from hand-made runs."""

import html
import io
import json
import shutil
from xml.etree import ElementTree

import pytest
from PIL import Image
from test_report import lines, make_run

from experiments import figures
from videoqa import world


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs whose first question becomes right, on drawn clips, each evaluated twice while it ran."""
    home = tmp_path_factory.mktemp("figures")
    world.make_world(home / "clips", range(2_000_000, 2_000_002), workers=1)
    folders = []
    for seed, (first, last) in enumerate([(0.25, 0.5), (0.75, 1.0)]):
        folder = make_run(home / f"seed{seed}", seed=seed)
        answers = [json.loads(line) for line in open(f"{folder}/answers.jsonl")]
        for row in answers:
            row["video"] = str(home / "clips" / f"clip200000{row['video'][1]}.mp4")
        lines(home / f"seed{seed}" / "answers.jsonl", answers)
        both = [{mode: {"accuracy": x} for mode in ("greedy", "sampled")} for x in (first, last)]
        rows = [{"step": step, **row} for step, row in zip((0, 3), both, strict=True)]
        lines(home / f"seed{seed}" / "evaluations.jsonl", rows)
        folders.append(folder)
    return folders


def test_one_command_draws_the_first_screen(runs, script, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("title\n<!-- figures -->\nold\n<!-- /figures -->\nrest\n")
    done = script(figures.main, "figures", *runs, "--out", tmp_path / "figures", "--page", page)
    assert done.returncode == 0, done.stderr
    told = page.read_text()
    assert "| color 0? | blue | **red** |" in told and "old" not in told and told.endswith("-->\nrest\n")
    assert "Of 4 held-out answers 2 became right and 1 wrong (seed 0)" in told and "range of 2 seeds" in told
    sheet = (tmp_path / "figures" / "clips.jpg").read_bytes()
    assert Image.open(io.BytesIO(sheet)).size == (576, 96) and len(sheet) < 150_000
    drawing = (tmp_path / "figures" / "learning.svg").read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg") and len(drawing) < 60_000
    assert drawing.count('class="curve"') == 2 and drawing.count("<circle") == 4
    mean, whisker = 'cy="69.0"', "M44.0 98.5L44.0 39.5"  # step 0: (0.25 + 0.75) / 2 of 118 above y = 128
    assert mean in drawing and whisker in drawing


def test_runs_and_pages_that_do_not_fit_are_one_line_and_nothing_is_written(runs, script, tmp_path):
    page, out = tmp_path / "README.md", tmp_path / "figures"
    page.write_text("no marks\n")
    under_way = make_run(tmp_path / "a", ended=False)
    for folder, words in (
        (runs[0], "<!-- figures -->"),
        (under_way, "--eval_every"),
        (tmp_path, "config.json"),
    ):
        done = script(figures.main, "figures", folder, "--out", out, "--page", page)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    assert not out.exists() and page.read_text() == "no marks\n"


def test_answers_stand_in_the_page_as_they_are_and_are_no_html_no_markdown_and_no_mark(
    runs, script, tmp_path
):
    page, run = tmp_path / "README.md", tmp_path / "run"
    shutil.copytree(runs[0], run)
    page.write_text("<!-- figures -->\n<!-- /figures -->\n")
    answers = [json.loads(line) for line in open(run / "answers.jsonl")]
    said = "<img src=x> | ![a](b) *it's*\n<!-- /figures -->"
    lines(run / "answers.jsonl", [row | {"greedy": said} if row["step"] else row for row in answers])
    for _ in range(2):
        done = script(figures.main, "figures", run, "--out", tmp_path / "figures", "--page", page)
        assert done.returncode == 0, done.stderr
        told = page.read_text()
        (row,) = (line for line in told.splitlines() if line.startswith("| color 0?"))
        cells = row.split("|")
        assert len(cells) == 6 and html.unescape(cells[3]).strip() == f"**{said}**".replace("|", "/").replace(
            "\n", " "
        )
        assert not set("<[!`") & set(cells[3]) and told.count("<!-- /figures -->") == 1


@pytest.mark.parametrize("row", [{"step": 9, "greedy": {}}, {"step": 9, "greedy": {"accuracy": "0.5"}}])
def test_a_damaged_evaluation_is_one_line_and_no_picture_is_written(runs, script, tmp_path, row):
    page, out, run = tmp_path / "README.md", tmp_path / "figures", tmp_path / "run"
    shutil.copytree(runs[0], run)
    page.write_text("<!-- figures -->\n<!-- /figures -->\n")
    with open(run / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    done = script(figures.main, "figures", run, "--out", out, "--page", page)
    assert (
        done.returncode == 2 and "evaluations.jsonl, line 3" in done.stderr and done.stderr.count("\n") == 1
    )
    assert not out.exists()
