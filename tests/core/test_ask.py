"""ask.py on the shipped policy with an adapter, and evaluations that go on where they were killed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ask
import eval as evaluation
import lora
from checkpoints.policies import load_policy, save_adapter_of
from data import PromptSet
from oracle import RuleOracle
from plumbing import run_folder
from plumbing.run_folder import Kept
from rollout import Sampling
from train import Config
from videoqa import world
from videoqa.answers import Question
from videoqa.questions import load_questions

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two drawn clips, and a run folder whose adapter turns every answer into something else."""
    folder = tmp_path_factory.mktemp("ask")
    world.make_world(folder / "clips", range(2_000_000, 2_000_002))
    config = Config(policy=str(ROOT / "weights"), dtype="float32", lora_r=2, max_new_tokens=9)
    policy, _ = load_policy(config)
    lora.add_adapters(policy.decoder, config.lora_r, config.lora_alpha)
    for layer in lora.layers(policy.decoder).values():
        layer.lora_B.data += 0.3
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(config.__dict__ | {"made": {}}))
    save_adapter_of(policy, str(folder / "run" / "adapter"))
    (folder / "torn.mp4").write_bytes((folder / "clips" / "clip2000000.mp4").read_bytes()[:300])
    (folder / "young").mkdir()  # a run that has no adapter yet
    shutil.copy(folder / "run" / "config.json", folder / "young")
    return folder


def clip(home):
    return home / "clips" / "clip2000000.mp4"


def test_it_shows_both_answers_probabilities_ranks_and_advantages(home, script):
    question = "what is the object in white"  # it is a block
    done = script(
        ask.main, "ask.py", home / "run", clip(home), question, "--gold", "block", "--group_size", "3"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "before training: block" and lines[1].startswith("after training: ")
    assert lines[1] != "after training: block"
    assert lines[2] == "| sampled answer | probability | oracle rank | policy rank | advantage |"
    rows = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert len(rows) == 3 and [float(row[1]) for row in rows] == sorted(float(row[1]) for row in rows)[::-1]
    assert abs(sum(float(row[4]) for row in rows)) < 2e-3  # the advantages of a group sum to zero


def test_a_gold_time_span_ranks_by_overlap_and_not_by_words():
    """Of the words "0.0 to 4.0 seconds" shares as many with the gold answer as "2.0 to 4.0 seconds" does."""
    options = dict(gold="1.5 to 4.0 seconds", group_size=3)
    _, questions = ask.questions_of(ask.AskOptions(**options), ["clip.mp4", "when does it move"])
    texts = ["0.0 to 4.0 seconds", "2.0 to 4.0 seconds", "blue"]
    assert RuleOracle().rank(questions, [texts]).ranks.tolist() == [[1, 0, 2]]
    words = ask.questions_of(ask.AskOptions(gold="blue"), ["clip.mp4", "what is seen"])[1]
    assert words[0].spans == ()


def test_without_a_run_folder_it_asks_the_shipped_policy(home, script):
    options = ["--policy", ROOT / "weights", "--oracle", "test_ask:longest_last"]
    done = script(ask.main, "ask.py", clip(home), "what is the object in white", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("without training: block\n") and "oracle rank" in done.stdout


def longest_last(question, texts, *, video, reference):
    return [sum(len(other) < len(text) for other in texts) for text in texts]


def test_predictions_are_those_that_score_takes_and_go_on_behind_a_kill(home, script, tmp_path):
    data, out = home / "clips" / "questions.jsonl", tmp_path / "pred.jsonl"
    command = ["ask.py", home / "run", "--data", data, "--videos", home / "clips", "--out", out]
    script(ask.main, *command)
    whole = out.read_text()
    out.write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"id": "cut in ha')
    done = script(ask.main, *command)
    assert out.read_text() == whole and "2 of them from before" in done.stdout
    scored = tmp_path / "scored.json"
    script(evaluation.main, "eval.py", "score", "--data", data, "--predictions", out, "--json", scored)
    assert json.loads(scored.read_text())["missing"] == 0


def test_predictions_of_another_question_policy_or_run_are_not_continued(home, script, tmp_path):
    out, weights = tmp_path / "pred.jsonl", ["--policy", ROOT / "weights"]
    asked = ["ask.py", home / "clips", "what color appears last"]
    done = script(ask.main, *asked, *weights, "--out", out)
    assert done.returncode == 0, done.stderr
    before = out.read_text()
    shutil.copytree(ROOT / "weights", tmp_path / "weights", ignore=shutil.ignore_patterns("made.json"))
    for command in (
        ["ask.py", home / "clips", "how many objects appear", *weights],
        [*asked, *weights, "--max_new_tokens", "3"],
        [*asked, "--policy", tmp_path / "weights"],
        ["ask.py", home / "run", *asked[1:]],
    ):
        done = script(ask.main, *command, "--out", out)
        assert done.returncode == 2 and "pred.jsonl: made of other files or options; " in done.stderr
    assert out.read_text() == before


def test_options_may_stand_between_the_words_and_the_start_may_be_any_folder(home, script, monkeypatch):
    monkeypatch.chdir(home)  # where there is no weights/
    words = ["--policy", "weights", "what color appears last", "--group_size", "2"]
    done = script(ask.main, "ask.py", clip(home), *words)
    assert done.returncode == 0 and done.stdout.startswith("without training: "), done.stderr


def test_temperature_and_length_are_those_asked_for_and_of_a_run_its_own_length(home, script, monkeypatch):
    seen = []
    monkeypatch.setattr(ask, "show_answers", lambda policy, asked, sampling, *more: seen.append(sampling))
    question = [clip(home), "what color appears last", "--temperature", "0.3"]
    done = script(ask.main, "ask.py", *question, "--policy", ROOT / "weights", "--max_new_tokens", "3")
    assert done.returncode == 0 and (seen[0].temperature, seen[0].max_new_tokens) == (0.3, 3), done.stderr
    script(ask.main, "ask.py", home / "run", *question)
    assert (seen[1].temperature, seen[1].max_new_tokens) == (0.3, 9)


def test_an_answer_without_a_word_is_shown_as_empty(home, script, monkeypatch):
    monkeypatch.setattr(PromptSet, "texts", lambda self, rollout: [""] * len(rollout.ended))
    done = script(ask.main, "ask.py", clip(home), "what color appears last", "--policy", ROOT / "weights")
    assert "without training: (empty)\n" in done.stdout and done.stdout.count("| (empty) |") == 5


def test_predictions_go_to_a_device_as_well_which_is_never_read(home, script, monkeypatch):
    monkeypatch.setattr(run_folder, "cut_back", lambda *given: pytest.fail("some devices have no end"))
    words = [home / "clips", "what color appears last", "--policy", ROOT / "weights"]
    done = script(ask.main, "ask.py", *words, "--out", "/dev/null")
    assert done.returncode == 0 and "2 predictions in /dev/null" in done.stdout, done.stderr


def test_a_file_of_something_else_is_no_file_of_predictions(home, script, tmp_path):
    (tmp_path / "one.json").write_text('{"a": 1}')  # one row without a line end, as of a kill
    words = [home / "clips", "what color appears last", "--policy", ROOT / "weights"]
    done = script(ask.main, "ask.py", *words, "--out", tmp_path / "one.json")
    assert done.returncode == 2 and "one.json: made of other files" in done.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"a": 1}']


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["{home}/run", "{clip}", " "], "the question is empty"),
        (["{home}", "{clip}", "what?"], "{home}/config.json"),
        (["{home}/run", "{home}/no.mp4", "what?"], "{home}/no.mp4"),
        (["{home}/run", "{home}/torn.mp4", "what?"], "{home}/torn.mp4"),
        (["{home}/young", "{clip}", "what?"], "{home}/young"),
        (["{home}/run", "--data", "{home}/clips/questions.jsonl"], "--out"),
        (["{clip}"], "[RUN] VIDEO QUESTION"),
        (
            ["{clip}", "what?", "--gold", "blue", "--group_size", "1"],
            "--group_size 1: one answer",
        ),
        (
            ["{home}/run", "{clip}", "what?", "--policy", "no"],
            "--policy no: the run in {home}/run",
        ),
        (["{clip}", "what?", "--out", "{home}/new", "--oracle", "no:such"], "--oracle no:such: --out takes"),
        (["--data", "{home}/clips/questions.jsonl", "--out", "{home}/clips/questions.jsonl"], "written over"),
        (["{clip}", "what?", "--videos", "{home}"], "--videos {home}: only the paths in --data"),
        (["", "{clip}", "what?"], "a RUN, VIDEO or QUESTION is empty"),
        (["{clip}", "what?", "--oracle", ""], "argument --oracle: it is empty"),
        (["{clip}", "what?", "--gold", "5 to 1 seconds"], "--gold 5 to 1 seconds: ends before it begins"),
    ],
)
def test_bad_input_is_one_line_and_status_2(home, script, words, names):
    places = {"home": home, "clip": clip(home)}
    done = script(ask.main, "ask.py", *(word.format(**places) for word in words))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert names.format(**places) in done.stderr


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(home, tmp_path):
    questions = load_questions(str(home / "clips" / "questions.jsonl"), str(home / "clips"))
    policy, tokenizer = load_policy(Config(policy=str(ROOT / "weights")))
    asked = PromptSet(policy, tokenizer, questions)
    sampling = Sampling.of(policy, tokenizer, max_new_tokens=6, prompts_at_once=4)
    straight = evaluation.evaluate(policy, asked, sampling, samples=2)

    class Killed(Kept):
        def add(self, rows):
            super().add(rows)
            raise KeyboardInterrupt

    path = str(tmp_path / "answers.jsonl")
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(policy, asked, sampling, samples=2, kept=Killed(path, {}, step=0))
    Kept(path, {}, step=5).add([{"id": questions[5].id, "greedy": "of another step"}])
    kept = Kept(path, {}, step=0)
    assert len(kept.of) == 4
    assert evaluation.evaluate(policy, asked, sampling, samples=2, kept=kept) == straight
    right = [row["right"] for row in Kept(path, {}, step=0).of.values()]
    assert sum(right) / len(right) == straight[0]["greedy"]["accuracy"]
    part, _ = evaluation.evaluate(policy, asked, sampling, samples=2, subset=5, kept=Kept(path, {}, step=0))
    assert part["greedy"]["n"] == 5
    assert torch.equal(torch.tensor(straight[1]["greedy"]), torch.tensor(right, dtype=torch.float64).float())


def test_sampled_answers_stand_likeliest_first_with_the_probability_of_the_whole_answer(monkeypatch, capsys):
    """Sums of log-probabilities of -1, -0.2 and -3; the right answer is the second likeliest."""
    logprobs, drawn = torch.tensor([[-0.5, -0.5], [-0.2, 0.0], [-3.0, 0.0]]), []

    def answer(policy, asked, row, G, sampling, uniforms):
        drawn.append(uniforms)
        texts = ["blue"] if uniforms is None else ["red", "blue", "green"]
        return SimpleNamespace(logprobs=logprobs), [texts]

    monkeypatch.setattr(ask, "answer", answer)
    asked = SimpleNamespace(questions=[Question("0", "a.mp4", "what?", "red")])
    for seed in (0, 1):
        cfg = ask.AskOptions(gold="red", group_size=3, seed=seed)
        ask.show_answers(SimpleNamespace(decoder=torch.nn.Module()), asked, None, cfg, trained=False)
    rows = capsys.readouterr().out.splitlines()
    cells = [[x.strip() for x in row.strip("|").split("|")][:4] for row in rows[3:6]]
    assert cells == [["blue", "0.8187", "1", "0"], ["red", "0.3679", "0", "1"], ["green", "0.0498", "1", "2"]]
    assert drawn[0] is drawn[2] is None and drawn[1].shape == (1, 3, 10) and not drawn[1].equal(drawn[3])


def test_predictions_of_a_run_are_made_of_its_options_its_adapter_and_its_best(tmp_path):
    questions, found = [Question("0", str(tmp_path / "a.mp4"), "what?", "red")], []
    (tmp_path / "a.mp4").write_text("")
    for name in ("config.json", "adapter", "best"):
        (tmp_path / name).write_text(name)
    found.append(ask.settings_of(ask.AskOptions(), str(tmp_path), questions))
    for name in ("config.json", "adapter", "best"):
        (tmp_path / name).write_text("another")
        found.append(ask.settings_of(ask.AskOptions(), str(tmp_path), questions))
    assert len({json.dumps(one) for one in found}) == 4
