"""The trained ranker: its loss and its report by hand, and one short training from weights/."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import pretrain
import train
from checkpoints.policies import load_model
from checkpoints.word_tokenizer import WordTokenizer
from oracles import ranker as ranker_room
from oracles.pairs import Pair, bradley_terry, draw_pairs, load_pairs, pair_report, train_ranker
from oracles.ranker import (
    Ranker,
    TrainedOracle,
    load_ranker,
    tied_ranks,
)
from plumbing.options import BadInput
from videoqa import world
from videoqa.answers import grade
from videoqa.questions import load_questions

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """weights/, and the clips of two small worlds."""
    folder = tmp_path_factory.mktemp("ranker")
    (folder / "weights").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(ROOT / "weights" / name, folder / "weights")
    world.make_world(folder / "world" / "train6", range(1_000_000, 1_000_006))
    world.make_world(folder / "world" / "eval3", range(2_000_000, 2_000_003))
    return folder


@pytest.fixture(scope="module")
def questions(home):
    return load_questions(str(home / "world" / "train6" / "questions.jsonl"), str(home / "world" / "train6"))


@pytest.fixture(scope="module")
def made(home):
    """The folder and the report of a short training on the world's pairs."""
    cfg = pretrain.Config(
        out=str(home / "weights"), world_dir=str(home / "world" / "pre"), stage="ranker", ranker_clips=16,
        held_share=0.25, ranker_steps=30, ranker_batch=6, pairs_per_video=4, error_rate=0.0,
    )  # fmt: skip
    return home / "weights" / "ranker", train_ranker(cfg)


def fresh():
    torch.manual_seed(0)
    return Ranker(load_model(ROOT / "weights"), WordTokenizer.load(ROOT / "weights" / "tokenizer.json"))


# ---- pairs


def test_bradley_terry_by_hand():
    loss = bradley_terry(torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(loss, torch.tensor([0.313262, 1.313262, 0.693147]), atol=1e-6, rtol=0)


def test_the_worlds_pairs_have_the_error_rate_that_was_asked_for(questions):
    pairs = draw_pairs(questions, 60, 0.2, seed=0)
    assert pairs == draw_pairs(questions, 60, 0.2, seed=0) != draw_pairs(questions, 60, 0.2, seed=1)
    of = {(question.video, question.question): question for question in questions}
    told_apart = [pair.truth for pair in pairs if pair.truth]
    for pair in pairs:
        grades = [grade(text, of[pair.video, pair.question]) for text in (pair.chosen, pair.rejected)]
        assert pair.truth == (grades[0] > grades[1]) - (grades[0] < grades[1])
        assert pair.chosen != pair.rejected
    assert len(told_apart) > 2000 and len(told_apart) < len(pairs)
    assert told_apart.count(-1) / len(told_apart) == pytest.approx(0.2, abs=0.03)
    assert {pair.truth for pair in draw_pairs(questions, 5, 0.0, seed=0)} == {0, 1}


def test_pairs_from_a_file_and_what_is_wrong_with_one(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"video": "a.mp4", "question": "what?", "chosen": "red ", "rejected": "blue"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"video": "b.mp4"}) + "\n")
    pairs = load_pairs(str(path), "videos")
    assert pairs[0] == Pair("videos/a.mp4", "what?", "red", "blue") and len(pairs) == 2
    for bad in ("[1", "7", '{"video": "a.mp4"}', json.dumps(good | {"chosen": 3}),
                json.dumps(good | {"chosen": "blue"}), json.dumps(good | {"chosen": ""}),
                json.dumps(good | {"question": " "}), json.dumps(good | {"video": ""})):  # fmt: skip
        path.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(BadInput, match=r"pairs\.jsonl, line 2: [^\n]*$"):
            load_pairs(str(path), "videos")
    path.write_text(json.dumps(good) + "\n")
    with pytest.raises(BadInput, match="at least 2 videos"):
        load_pairs(str(path), "videos")


def test_the_report_by_hand_and_on_scores_that_are_calibrated():
    # right, wrong, tie; the second label is known to be wrong, so there the scores were right
    report = pair_report(torch.tensor([2.0, -1.0, 0.0]), [1, -1, 0])
    assert report["pairs"] == 3 and report["accuracy"] == 0.5 and report["true_accuracy"] == 1.0
    # bins: sigmoid(2) = .8808 right, sigmoid(1) = .7311 wrong, .5 half right
    assert report["calibration_error"] == pytest.approx((0.119203 + 0.731059 + 0) / 3, abs=1e-5)
    assert [n for _, _, n in report["bins"]] == [1, 1, 1]
    assert "true_accuracy" not in pair_report(torch.tensor([2.0]), [None])
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(20000, generator=generator) * 2
    came = torch.rand(20000, generator=generator) < torch.sigmoid(difference)
    difference = torch.where(came, difference, -difference)
    assert pair_report(difference, [None] * 20000)["calibration_error"] < 0.01
    assert pair_report(3 * difference, [None] * 20000)["calibration_error"] > 0.05  # too sure of itself


# ---- scores and ranks


def test_a_score_depends_on_video_question_and_answer_alone_not_on_the_rest_of_the_batch():
    scorer, generator = fresh(), torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 32, 128, generator=generator)
    rows = [[("what color is the block", "red"), ("when", "0.5 to 1.0 seconds")],
            [("what", "a much longer answer that says nothing at all"), ("when", "")]]  # fmt: skip
    with torch.no_grad():
        scores = scorer(embeds, rows)
        for p in range(2):
            for r in range(2):
                alone = scorer(embeds[p : p + 1], [[rows[p][r]]])
                torch.testing.assert_close(alone[0, 0], scores[p, r], atol=1e-5, rtol=0)
        other = scorer(embeds.flip(0), rows)
    assert scores.shape == (2, 2) and (scores - other).abs().min() > 1e-5  # and it does see the video
    assert len({round(x, 5) for x in scores.flatten().tolist()}) == 4


def test_what_is_closer_than_the_margin_to_the_best_of_its_level_ties():
    assert tied_ranks([0.0, 1.0, 3.0], 0.5) == [2, 1, 0]
    assert tied_ranks([0.0, 0.4, 0.8, 3.0], 0.5) == [3, 1, 1, 0]  # no chain of ties
    assert tied_ranks([1.0, 1.0, 0.0], 0.0) == [0, 0, 2]


def test_a_group_is_ranked_in_one_pass_identical_texts_tie_and_a_video_is_read_once(questions, monkeypatch):
    passes, read, real = [], [], ranker_room.embed_videos

    class Counting(Ranker):
        def forward(self, video_embeds, rows):
            passes.append(len(rows) * len(rows[0]))
            return super().forward(video_embeds, rows)

    scorer = fresh()
    scorer.__class__ = Counting
    monkeypatch.setattr(ranker_room, "embed_videos", lambda m, shown: read.extend(shown) or real(m, shown))
    oracle, batch = TrainedOracle(scorer, 0.0), [questions[0], questions[1], questions[-1]]
    ranking = oracle.rank(batch, [["red", "blue", " red "]] * 3)
    again = oracle.rank(batch, [["blue", "red", "red"]] * 3)
    assert passes == [9, 9] and read == sorted({question.shown for question in batch})
    assert ranking.ok.all() and ranking.ranks.dtype == torch.int64 and ranking.ranks.shape == (3, 3)
    assert torch.equal(ranking.ranks[:, 0], ranking.ranks[:, 2]) and (ranking.ranks.amin(dim=1) == 0).all()
    assert torch.equal(again.ranks[:, 0], ranking.ranks[:, 1])  # by text, not by place
    assert (TrainedOracle(scorer, 1e9).rank(batch, [list("abc")] * 3).ranks == 0).all()


# ---- a training, and a run with what it made


def test_a_short_training_learns_from_pairs_and_its_file_gives_the_same_scores(made):
    folder, report = made
    assert json.loads((folder / "made.json").read_text()) == report and report["error_rate"] == 0.0
    print(report)
    assert report["true_accuracy"] > 0.6 and report["nll"] < 0.69  # 30 steps on 12 clips; chance is 0.5
    assert (folder / "ranker.safetensors").stat().st_size < 2_000_000 and not list(folder.glob("*.tmp"))
    loaded = load_ranker(str(folder))
    assert not any(p.requires_grad for p in loaded.parameters())
    before, after = load_model(folder.parent), loaded.model
    assert torch.equal(before.bridge.fc1.weight, after.bridge.fc1.weight)  # the frozen parts stayed
    assert not torch.equal(before.decoder.head, after.decoder.head)


def test_a_training_on_a_file_of_pairs(home, questions, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "weights", tmp_path / "w", ignore=shutil.ignore_patterns("ranker"))
    pairs = draw_pairs(questions, 1, 0.0, seed=0)
    rows = [vars(pair) | {"video": Path(pair.video).name} for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = f"pretrain.py --stage ranker --out {tmp_path / 'w'} --pairs {tmp_path / 'pairs.jsonl'}"
    command += f" --videos {home / 'world' / 'train6'} --ranker_steps 2 --ranker_batch 3"
    monkeypatch.setattr(sys, "argv", command.split())
    pretrain.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["error_rate"] is None and report["pairs"] + report["trained_on"] == len(pairs)
    assert "true_accuracy" not in report and (tmp_path / "w" / "ranker" / "ranker.safetensors").exists()
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--stage", "ranker", "--pairs", "x.jsonl"])
    with pytest.raises(BadInput, match="--pairs and --videos go together"):
        pretrain.main()


def test_a_ranker_that_is_not_there_or_of_other_weights_is_one_line(made, tmp_path):
    with pytest.raises(BadInput, match=r"ranker\.safetensors: no such file; .*--stage ranker"):
        load_ranker(str(tmp_path / "ranker"))
    shutil.copytree(made[0].parent, tmp_path / "w")
    with open(tmp_path / "w" / "model.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(BadInput, match="was trained from another .*model.safetensors"):
        load_ranker(str(tmp_path / "w" / "ranker"))
    (tmp_path / "w" / "ranker" / "ranker.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match="deserializing header.*--stage ranker"):
        load_ranker(str(tmp_path / "w" / "ranker"))


def test_a_ranker_in_a_folder_without_a_policy_is_one_line(script, tmp_path):
    done = script(pretrain.main, "pretrain.py", "--stage", "ranker", "--out", tmp_path / "new")
    assert done.returncode == 2 and "the ranker starts from a policy" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_run_with_the_trained_ranker_as_oracle(home, made, monkeypatch):
    command = f"train.py --oracle trained --ranker {made[0]} --policy {home / 'weights'} --out {home / 'run'}"
    command += f" --world_dir {home / 'world'} --num_train_clips 6 --num_eval_clips 3 --eval_samples 1"
    command += " --num_steps 1 --batch_prompts 8 --dtype float32"
    monkeypatch.setattr(sys, "argv", command.split())
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert train.main() == 0
    finally:
        signal.signal(signal.SIGINT, handler)
    row = json.loads((home / "run" / "metrics.jsonl").read_text())
    assert row["failed_groups"] == 0 and row["dead_groups"] < 8 and row["oracle_share"] < 1
