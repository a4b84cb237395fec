"""The comparison of objectives: its measures by hand, and all of it small."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_report import lines, make_run
from test_study import TINY, in_this_process  # noqa: F401

import train
from experiments import rivals, study
from oracles.choose import choose_oracle
from oracles.combine import BentOracle
from plumbing import page
from plumbing.options import BadInput, parse_args


def test_the_area_under_a_curve_is_its_mean_height():
    assert rivals.area([(0, 0.2), (10, 0.6), (30, 0.8)]) == pytest.approx((10 * 0.4 + 20 * 0.7) / 30)


def test_paired_intervals_are_students():
    # gaps 1, 2, 3: mean 2, standard deviation 1, half width 4.30 / sqrt(3) = 2.48
    assert rivals.paired([3.0, 5.0, 7.0], [2.0, 3.0, 4.0]) == "+2.0 [-0.5, +4.5]"
    assert rivals.paired([3.0], [2.0]) == "+1.0"
    # 9 and 100 seeds of gaps 1 and 3 in turn: 2.31 * 1.054 / 3 and 2.12 * 1.005 / 10
    assert rivals.paired([1.0, 3.0] * 4 + [2.0], [0.0] * 9) == "+2.0 [+1.2, +2.8]"
    assert rivals.paired([1.0, 3.0] * 50, [0.0] * 100) == "+2.0 [+1.8, +2.2]"


def test_every_line_is_a_configuration_of_train_py(monkeypatch):
    lines = rivals.RIVALS | rivals.FEEDBACK
    assert len({options for options in lines.values()}) == len(lines) - 2  # exact order and score are in both
    for options in lines.values():
        monkeypatch.setattr(sys, "argv", ["train.py", *options.split(), "--lr", "0.001"])
        parse_args(train.Config, train.PRESETS)


def test_the_study_finds_each_rate_trains_with_it_and_writes_table_and_curves(
    tmp_path,
    monkeypatch,
    in_this_process,  # noqa: F811
):
    page = tmp_path / "page.md"
    page.write_text("<!-- rivals_study -->\n<!-- /rivals_study -->\n")
    chosen = {name: rivals.RIVALS[name] for name in ("GRPO_rank", "PPO")}
    monkeypatch.setattr(rivals, "RIVALS", chosen)
    rates = (1e-4, 3e-3)
    options = [
        *TINY,
        "--world_dir",
        str(tmp_path / "world"),
        "--num_train_clips",
        "6",
        "--num_eval_clips",
        "3",
    ]
    with pytest.raises(BadInput, match="--eval_every"):
        rivals.rivals_study(str(tmp_path / "study"), 1, options, str(page), rates)
    options += ["--eval_every", "1", "--eval_subset", "20"]
    found = rivals.rivals_study(str(tmp_path / "study"), 1, options, str(page), rates)
    rows = found.splitlines()
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == ["nothing yet: the start", *chosen]
    assert found in page.read_text() and (tmp_path / "figures" / "rivals.svg").stat().st_size > 500
    rates = json.loads((tmp_path / "study" / "rates.json").read_text())
    for name, areas in rates.items():
        assert f"| {name} | {max(areas, key=areas.get)} | 1 |" in found
    stored = [json.loads(path.read_text()) for path in (tmp_path / "study").glob("*/config.json")]
    assert sorted((c["objective"], c["seed"]) for c in stored) == sorted(
        [(name, seed) for name in ("grpo_rank", "ppo") for seed in (0, 100, 100, 101, 101)]
    )


def test_a_curve_ends_with_the_first_of_its_runs_and_says_so_where_another_went_on(tmp_path):
    ends = {"a": (3, 3), "b": (3, 2)}  # the second run of b was stopped early
    for name, seed in ((name, seed) for name in ends for seed in (0, 1)):
        run = tmp_path / study.study_run("", name, seed)
        run.mkdir()
        rows = [{"step": i, "sampled": {"accuracy": 0.25 + 0.5 * seed}} for i in range(ends[name][seed] + 1)]
        lines(run / "evaluations.jsonl", rows)
    drawing = rivals.curves(ends, str(tmp_path), 2)
    texts = [node.text for node in ElementTree.fromstring(drawing).iter() if node.tag.endswith("text")]
    assert {"a", "b, to step 2"} <= set(texts)
    whole = page.figure(
        "sampled accuracy by step, mean and range of 2 seeds",
        [(name, [(i, 0.5, 0.25, 0.75) for i in range(n)]) for name, n in (("a", 4), ("b, to step 2", 3))],
    )
    assert drawing == whole


class Known:
    """An oracle whose scores are known: the length of the text."""

    def rank(self, batch, texts):
        from grpo_rank import ranks_from_scores
        from oracle import Ranking

        scores = torch.tensor([[float(len(text)) for text in group] for group in texts], dtype=torch.float64)
        return Ranking(ranks_from_scores(scores), scores=scores)


def test_bent_scores_keep_a_question_s_order_have_a_scale_for_each_and_tie_equal_texts(monkeypatch):
    from videoqa.answers import Question

    batch = [Question(str(i), "a.mp4", "q", "a") for i in range(40)]
    texts = [["aaaa", "a", "aaaaaaaaaa", "a", ""]] * 40
    bent = BentOracle(Known(), torch.Generator().manual_seed(0), 1.0, 0.0, top=10.0, seed=0).rank(
        batch, texts
    )
    exact = Known().rank(batch, texts)
    order = exact.scores.argsort(dim=1)
    assert (bent.scores.gather(1, order).diff(dim=1) >= 0).all()
    assert (bent.scores[:, 1] == bent.scores[:, 3]).all() and (bent.scores == bent.scores.round()).all()
    assert bent.scores[:, 2].unique().numel() > 2 and bent.scores[:, 4].unique().numel() > 2
    noisy = BentOracle(Known(), torch.Generator().manual_seed(0), 0.0, 0.3, top=10.0, seed=0).rank(
        batch, texts
    )
    assert (noisy.scores[:, 1] == noisy.scores[:, 3]).all() and (noisy.ranks != exact.ranks).any()
    spread = (noisy.scores[:, 0] - 4).std().item()
    assert math.isclose(spread, 3, rel_tol=0.4)
    for other in ("rule", "lexicographic"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--score_noise", "0.1", "--oracle", other])
        cfg = parse_args(train.Config, train.PRESETS)
        with pytest.raises(BadInput, match="--oracle sum"):
            choose_oracle(cfg, torch.Generator(), torch.device("cpu"))


def test_the_figure_draws_and_names_every_rival_however_many_there_are():
    lines = [*rivals.RIVALS, *(f"line {i}" for i in range(80))]
    drawing = page.figure("words", [(name, [(0, 0.2, 0.1, 0.3), (10, 0.6, 0.5, 0.7)]) for name in lines])
    texts = [node.text for node in ElementTree.fromstring(drawing).iter() if node.tag.endswith("text")]
    assert set(lines) <= set(texts) and drawing.count('class="curve"') == len(lines)


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("content", ["", "{}", '{"step": ', '{"step": 9, "kl": "a", "sampled": {}}'])
def test_a_damaged_file_of_a_run_is_named_with_the_remedy(tmp_path, name, content):
    run = tmp_path / study.study_run("", "no noise", 0)
    make_run(run)
    lines(run / "metrics.jsonl", [{"step": 0, "advantage_rms": 0.5, "asked_groups": 8, "kl": None}])
    lines(run / "evaluations.jsonl", [{"step": i, "sampled": {"accuracy": 0.5}} for i in (0, 3)])
    assert rivals.numbers_of(str(run))["area"] == 50 and study.study_table(str(tmp_path), 1)
    (run / name).write_text(content)
    with pytest.raises(BadInput, match=f"{name}.*; remove its folder"):
        rivals.numbers_of(str(run))
    if name == "results.json":
        for table in (study.study_table, partial(study.answers_table, ["no noise"])):
            with pytest.raises(BadInput, match=f"{name}.*; remove its folder"):
                table(str(tmp_path), 1)


def test_runs_without_spans_or_with_nothing_else_have_no_row_in_the_table_of_answers(tmp_path):
    run = make_run(tmp_path / study.study_run("", "a", 0))
    with pytest.raises(BadInput, match=r"results\.json.*Temporal Grounding and others"):
        study.answers_table(["a"], str(tmp_path), 1)
    results = json.loads(Path(run, "results.json").read_text())
    part = {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 4, "mean_iou": 0.25}
    part |= {
        "by_category": {"Temporal Grounding": {"accuracy": 0.0, "n": 1}, "Color": {"accuracy": 0.5, "n": 3}}
    }
    both = {"greedy": part, "sampled": part}
    Path(run, "results.json").write_text(json.dumps(results | {"before": both, "after": both}))
    row = "| a | 1 | 66.7 [66.7, 66.7] | 25.0 [25.0, 25.0] | 0.0 [0.0, 0.0] |"
    assert study.answers_table(["a"], str(tmp_path), 1).splitlines()[-1] == row
