"""The tour's step, and the page that walks along it."""

import re
from pathlib import Path

from experiments import tour

ROOT = Path(__file__).parents[2]


def test_the_step_of_one_prompt_raises_the_right_answer_and_shows_the_papers_shapes(script):
    done = script(tour.main, "tour", "--policy", ROOT / "weights")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name, shape in {
        "frames": "(8, 3, 48, 48)",
        "patch_tokens": "(1, 8, 36, 96)",
        "advantages": "(1, 5)",
    }.items():
        assert re.search(rf"^  {name} +{re.escape(shape)} ", done.stdout, re.M), name
    moved = re.findall(r"^  (\w+) +advantage ([+-][\d.]+) +([\d.]+) -> ([\d.]+)$", done.stdout, re.M)
    assert len(moved) == 5 and {text for text, *_ in moved} == {"red", "white"}
    for _, advantage, before, after in moved:
        assert (float(after) > float(before)) == (float(advantage) > 0)


def test_a_dead_group_ends_the_tour_before_the_update(script):
    done = script(tour.main, "tour", "--policy", ROOT / "weights", "--clip", "2000000")
    assert done.returncode == 0 and "the group is dead" in done.stdout and "lora_A" not in done.stdout


def test_a_question_that_is_not_of_the_scene_is_one_line_with_those_that_are(script):
    done = script(
        tour.main, "tour", "--policy", ROOT / "weights", "--question", "what is the meaning of life"
    )
    assert done.returncode == 2 and not done.stdout, done.stderr
    assert (
        "--question what is the meaning of life" in done.stderr and "how many objects appear" in done.stderr
    )
