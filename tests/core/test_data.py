import os
import sys
from types import SimpleNamespace

import pytest
import torch
from test_questions import GOOD, write_lines
from test_video import REAL_CLIPS, index_of, make_broken, needs_real_clips, write_video

import data
from checkpoints.word_tokenizer import WordTokenizer
from plumbing.options import BadInput
from videoqa.answers import Question, prompt_text

ROOT = os.path.dirname(os.path.abspath(data.__file__))

# ---- the command ----


def run_check(script, *arguments):
    return script(data.main, "data.py", "check", *arguments)


def test_check_lists_every_video_once_and_exits_2(script, tmp_path):
    write_video(tmp_path / "good.mp4", range(20))
    make_broken(tmp_path / "empty.mp4", "empty")
    videos = ["missing.mp4", "good.mp4", "empty.mp4", "good.mp4"]
    rows = [GOOD | {"id": str(i), "video": video} for i, video in enumerate(videos)]
    done = run_check(script, write_lines(tmp_path / "q.jsonl", *rows), "--videos", tmp_path)
    missing, good, empty, summary = done.stdout.splitlines()
    assert done.returncode == 2 and done.stderr == ""
    assert missing.startswith("FAIL") and missing.endswith("missing.mp4  no such file")
    assert good.startswith("ok") and good.endswith("20 frames, 10.000 fps, 2.00 s, h264 64x64")
    assert empty.startswith("FAIL") and "empty.mp4  file is empty" in empty
    assert summary == "3 videos: 1 ok, 2 failed"


def test_check_fails_a_video_that_ends_before_a_part_that_is_asked_about(script, tmp_path):
    write_video(tmp_path / "good.mp4", range(20))
    rows = [GOOD | {"id": str(end), "video": "good.mp4", "clip": [1, end]} for end in (2, 3.5, 1.5)]
    done = run_check(script, write_lines(tmp_path / "q.jsonl", *rows), "--videos", tmp_path)
    assert done.returncode == 2 and "good.mp4  it is 2.0 s long, but a part" in done.stdout
    assert "ends at 3.5 s" in done.stdout
    done = run_check(script, write_lines(tmp_path / "q.jsonl", *rows[::2]), "--videos", tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("ok")
    row = GOOD | {"video": "good.mp4", "span": [1, 300]}  # a right answer that nobody can see
    done = run_check(script, write_lines(tmp_path / "q.jsonl", row), "--videos", tmp_path)
    assert done.returncode == 2 and "ends at 300.0 s" in done.stdout


def test_a_conversion_writes_over_none_of_its_inputs(script, tmp_path):
    write_video(tmp_path / "AAAAA.mp4", range(20))
    (tmp_path / "a.txt").write_text("AAAAA 0.1 1.0##somebody sits\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in before:
        words = ["charades_sta", tmp_path / "a.txt", "--videos", tmp_path, "--out", path]
        done = script(data.main, "data.py", "convert", *words)
        assert done.returncode == 2 and "would be written over" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_video_in_both_sets_is_told_however_its_path_is_written(tmp_path, capsys):
    for name, video in (("one", "v/a.mp4"), ("two", "v/./a.mp4")):
        write_lines(tmp_path / f"{name}.jsonl", GOOD | {"id": name, "video": video})
    same = dict(videos=str(tmp_path), eval_data=str(tmp_path / "two.jsonl"), eval_videos=f"{tmp_path}/.")
    data.load_sets(data.DataOptions(data=str(tmp_path / "one.jsonl"), **same), 0)
    assert "1 videos are in both sets" in capsys.readouterr().out
    rows = [GOOD | {"id": video, "video": video} for video in ("v/a.mp4", "v/./a.mp4")]
    write_lines(tmp_path / "both.jsonl", *rows)
    with pytest.raises(BadInput, match="only 1 video"):
        data.load_sets(data.DataOptions(data=str(tmp_path / "both.jsonl"), videos=str(tmp_path)), 0)


def test_check_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    path = write_lines(tmp_path / "q.jsonl", "{")
    monkeypatch.setattr(sys, "argv", ["data.py", "check", path, "--videos", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        data.run_script(data.main)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}, line 1: not JSON") and error.count("\n") == 1
    write_video(tmp_path / "good.mp4", range(2))
    write_lines(tmp_path / "q.jsonl", GOOD | {"video": "good.mp4"})
    with pytest.raises(SystemExit, match="0"):
        data.run_script(data.main)
    monkeypatch.setattr(sys, "argv", ["data.py", "check", path, "--vid", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):  # no abbreviations
        data.run_script(data.main)


# ---- batches ----

WORDS = ["the", "cat", "sat", "1.5", "answer", "7", "ü", "("]


def test_prompt_is_begin_video_question_answer():
    tokenizer = WordTokenizer(WORDS)
    question = Question("a", "v", "the cat?", "red", options=("the", "cat"), answer_index=0)
    prompt = data.build_prompt(tokenizer, question, 5, [0.5])
    assert prompt[:6] == [data.BOS_ID] + [data.VIDEO_ID] * 5
    assert tokenizer.decode(prompt) == prompt_text(question)


def test_a_question_about_a_part_sees_no_more_and_each_part_is_embedded_once(tmp_path):
    class Model:
        cfg = SimpleNamespace(num_frames=4, framing="ffmpeg", max_positions=0)
        clip_cfg = SimpleNamespace(image_size=32, num_patches=4)
        calls = []

        def embed_video(self, frames, times):
            self.calls.append(times.tolist())
            return torch.tensor([[[index_of(frame) / 10] for frame in clip] for clip in frames])

    video = write_video(tmp_path / "a.mp4", range(40))
    parts = [None, (1.0, 2.0), None, (1.0, 2.0), (3.0, 4.0)]
    questions = [Question(str(i), video, "the cat?", "red", clip=part) for i, part in enumerate(parts)]
    prompts = data.PromptSet(Model(), WordTokenizer(WORDS), questions)
    embeds = prompts[torch.arange(5)].video_embeds[..., 0]
    (times,) = Model.calls
    assert len(times) == 3 and torch.equal(embeds[0], embeds[2]) and torch.equal(embeds[1], embeds[3])
    # frame i is at i / 10 s
    torch.testing.assert_close(embeds[[0, 1, 4]], torch.tensor(times), atol=1e-4, rtol=0)
    for row, (start, end) in ((0, (0, 4)), (1, (1, 2)), (4, (3, 4))):
        assert start <= embeds[row].min() < start + 0.51 and end - 0.51 < embeds[row].max() < end


def test_prompts_are_padded_left_and_completions_right():
    prompt_ids, prompt_mask = data.collate_prompts([[1, 7], [1, 8, 9]])
    before = [0] * (data.PROMPT_BLOCK - 3)
    assert prompt_ids.tolist() == [[*before, 0, 1, 7], [*before, 1, 8, 9]] and prompt_ids.dtype == torch.int64
    assert prompt_mask.int().tolist() == [[*before, 0, 1, 1], [*before, 1, 1, 1]]
    completion_ids, completion_mask = data.collate_completions([[7, data.EOS_ID], [7, 8, 9], []])
    assert completion_ids.tolist() == [[7, data.EOS_ID, 0], [7, 8, 9], [0, 0, 0]]
    assert completion_mask.tolist() == [[True, True, False], [True, True, True], [False, False, False]]


@pytest.mark.parametrize("num_prompts, num_questions", [(1, 8), (8, 1)])
def test_a_process_without_a_prompt_is_refused_before_the_first_step(num_prompts, num_questions):
    with pytest.raises(BadInput, match="^--batch_prompts: .* for 2 processes; .* start fewer"):
        data.Batches([None] * num_questions, num_prompts, 0, torch.Generator(), (1, 2))


@pytest.mark.parametrize(("num_questions", "num_prompts", "asked"), [(9, 5, 4), (3, 8, 2), (9, 8, 8)])
def test_a_step_of_fewer_prompts_than_asked_for_is_said(capsys, num_questions, num_prompts, asked):
    batches = data.Batches([None] * num_questions, num_prompts, 0, torch.Generator(), (1, 2))
    said = (
        f"--batch_prompts {num_prompts}: {asked} prompts a step of {num_questions} questions, for 2 processes"
    )
    assert batches.P == asked and (said in " ".join(capsys.readouterr().out.split())) == (asked < num_prompts)


# ---- real clips ----


@needs_real_clips
def test_check_names_the_broken_files(script):
    done = run_check(script, os.path.join(REAL_CLIPS, "real_clips_with_broken.jsonl"), "--videos", REAL_CLIPS)
    failed = {
        os.path.basename(line.split("  ")[1]) for line in done.stdout.splitlines() if line[:4] == "FAIL"
    }
    names = {"empty.mp4", "text.mp4", "truncated.mp4", "damaged.avi", "audio_only.mp4", "missing.mp4"}
    assert failed == names and done.returncode == 2


def batches(num_questions, P, process=(0, 1), seed=0, fill=1):
    return data.Batches([None] * num_questions, P, seed, torch.Generator(), process, fill)


def test_an_epoch_asks_every_question_once_in_an_order_of_its_own_that_the_seed_decides():
    sets = [batches(12, 4, seed=seed) for seed in (0, 1)]
    orders = [
        torch.cat([one.rows(3 * epoch + i) for i in range(3)]).tolist() for one in sets for epoch in range(3)
    ]
    assert sets[0].steps_an_epoch == 3 and all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, orders))) == 6


def test_attempts_to_fill_a_step_ask_further_questions_of_the_epoch_with_draws_of_their_own():
    one, asked, draws = batches(13, 2, fill=3), [], []
    assert (one.fill, one.steps_an_epoch) == (3, 2) and batches(13, 2, fill=9).fill == 6
    for step in range(2):
        for attempt in range(3):
            rows, uniforms = one.of_step(step, 2, 5, attempt)
            asked += rows.tolist()
            draws.append(uniforms)
    assert len(set(asked)) == 12 and len(torch.stack(draws).unique()) == 6 * 2 * 2 * 5


def test_processes_share_a_steps_questions_and_draws_and_each_has_noise_of_its_own():
    whole, halves, noises = batches(12, 4).of_step(2, 3, 5), [], set()
    for index in range(2):
        half = batches(12, 4, (index, 2))
        halves.append(half.of_step(2, 3, 5))
        noises.add(half.noise.initial_seed())
        half.of_step(3, 3, 5)
        noises.add(half.noise.initial_seed())
        again = batches(12, 4, (index, 2))
        assert again.of_step(2, 3, 5)[1].equal(halves[-1][1]) and again.noise.initial_seed() in noises
    for part, of_all in zip(zip(*halves, strict=True), whole, strict=True):
        assert torch.cat(part).equal(of_all)
    assert len(noises) == 4  # of two processes in two steps


def test_held_out_videos_are_a_share_that_the_seed_draws_and_none_is_learned_from(tmp_path):
    rows = [GOOD | {"id": f"{i}{j}", "video": f"{i}.mp4"} for i in range(11) for j in range(2)]
    path, held = write_lines(tmp_path / "q.jsonl", *rows), set()
    for seed in range(3):
        for share, count in ((0.25, 3), (0.01, 1), (1.0, 10)):  # round(2.75); both sets have a video at least
            options = data.DataOptions(data=path, videos=str(tmp_path), eval_share=share)
            sets = data.load_sets(options, seed)
            learn, test = ({question.video for question in part} for part in sets)
            assert len(test) == count and not learn & test and len(sets[0]) + len(sets[1]) == 22
        held.add(tuple(sorted(question.id for question in sets[0])))
    assert len(held) > 1


def test_videos_of_held_out_questions_may_lie_in_a_folder_of_their_own(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", GOOD | {"video": "a.mp4"})
    for folder, wanted in (("", "here"), ("there", "there")):
        options = data.DataOptions(data=path, videos="here", eval_data=path, eval_videos=folder)
        assert [q.video for part in data.load_sets(options, 0) for q in part] == [
            "here/a.mp4",
            f"{wanted}/a.mp4",
        ]
