import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from types import SimpleNamespace

import av
import numpy as np
import pytest

from checkpoints.word_tokenizer import FIRST_BYTE, WordTokenizer
from oracles.pairs import pairs_to_learn
from plumbing.options import BadInput, place
from videoqa import world
from videoqa.answers import is_correct, prompt_text, reward, task
from videoqa.questions import load_questions
from videoqa.scenes import COLORS, DURATION, FPS, HARD_DURATION, Scene, draw_frame, make_scene, write_clip
from videoqa.world import NUMBERS, make_questions

SCENES = [make_scene(seed) for seed in range(5000, 5600)]
QUESTIONS = [make_questions(scene, f"clip{scene.seed}.mp4") for scene in SCENES]


def watch(scene):
    """From the pixels alone: colour -> [(time, centre x, centre y, area)] of the frames that show it."""
    tracks = defaultdict(list)
    for i in range(round(FPS * DURATION)):
        frame = draw_frame(scene, i / FPS).astype(int)
        for color, rgb in COLORS.items():
            y, x = np.nonzero(abs(frame - rgb).sum(axis=-1) < 120)
            if len(x):
                tracks[color].append(
                    (
                        i / FPS,
                        (x.min() + x.max()) / 2,
                        (y.min() + y.max()) / 2,
                        (np.ptp(x) + 1) * (np.ptp(y) + 1),
                    )
                )
    return dict(sorted(tracks.items(), key=lambda item: item[1][0][0]))  # by appearance


def action(track):
    (_, x, y, area), (_, u, v, grown) = track[0], track[-1]
    if max(abs(u - x), abs(v - y)) > 8:
        return side(u - x, v - y, "left", "right", "up", "down")
    return "grows" if grown > 2 * area else "still"


def side(dx, dy, left, right, up, down):
    return (left if dx < 0 else right) if abs(dx) > abs(dy) else (up if dy < 0 else down)


def answer(row, scene, tracks):
    """The row's answer by what was watched; only kinds come from the scene."""
    words = re.findall(r"\w+", row["question"])
    asked = [word for word in words if word in COLORS]
    track, order = tracks.get(asked[0]) if asked else None, list(tracks)
    match row["category"]:
        case "Object Recognition":
            return {o.color: o.kind for o in scene.things}[asked[0]]
        case "Attribute Perception":
            return {o.kind: o.color for o in scene.things}[words[-1]]
        case "Counting Problem":
            return NUMBERS[len(tracks)]
        case "Spatial Perception":
            return f"{'top' if track[0][2] < 24 else 'bottom'} {'left' if track[0][1] < 24 else 'right'}"
        case "Action Recognition":
            return action(track)
        case "Action Reasoning":  # "... that moves left", "... that stays still", "... that grows"
            (color,) = (c for c in tracks if action(tracks[c]) == words[-1])
            return color
        case "Temporal Perception":
            return order[-1 if "last" in words else 0]
        case "Temporal Reasoning":
            return order[order.index(asked[0]) + (1 if "after" in words else -1)]
        case "Spatial Reasoning":
            other = {t: (x, y) for t, x, y, _ in tracks[asked[1]]}
            both = [(x - other[t][0], y - other[t][1]) for t, x, y, _ in track if t in other]
            (relation,) = {side(dx, dy, "left", "right", "above", "below") for dx, dy in both}
            return relation
        case "Temporal Grounding":
            return f"{track[0][0]:.1f} to {track[-1][0] + 1 / FPS:.1f} seconds"


def test_the_same_seed_gives_the_same_scene_and_questions():
    assert make_scene(7) == make_scene(7) != make_scene(8)
    assert make_questions(make_scene(7), "a.mp4") == make_questions(make_scene(7), "a.mp4")
    assert (draw_frame(make_scene(7), 1.0) == draw_frame(make_scene(7), 1.0)).all()


def test_every_answer_is_what_the_pixels_show():
    checked = Counter()
    for scene, rows in zip(SCENES[:60], QUESTIONS, strict=False):
        tracks = watch(scene)
        for row in rows:
            assert row["answer"] == answer(row, scene, tracks), (scene, row)
            if row["category"] == "Temporal Grounding":
                assert row["answer"] == f"{row['span'][0]} to {row['span'][1]} seconds"
            checked[row["category"]] += 1
    assert set(checked) == set(world.LOOSE_ANSWERS) - {"Order", "Duration"} and min(checked.values()) >= 10


def test_at_least_eight_tasks_of_video_mme_and_spans_are_asked():
    tasks = {
        "Temporal Perception", "Spatial Perception", "Attribute Perception", "Action Recognition",
        "Object Recognition", "OCR Problems", "Counting Problem", "Temporal Reasoning",
        "Spatial Reasoning", "Action Reasoning", "Object Reasoning", "Information Synopsis",
    }  # fmt: skip
    asked = {row["category"] for rows in QUESTIONS for row in rows}
    assert len(asked & tasks) >= 8 and asked - tasks == {"Temporal Grounding"}
    ids = [row["id"] for rows in QUESTIONS for row in rows]
    assert len(set(ids)) == len(ids)


def test_without_a_thread_for_the_drawing_processes_none_is_left_to_be_waited_for(tmp_path, monkeypatch):
    me, real = os.getpid(), threading.Thread.start

    def start(thread):
        if os.getpid() == me:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(BadInput, match="drawing processes failed .*thread.*allow more memory"):
        world.make_world(tmp_path, range(2), workers=2)
    for process in multiprocessing.active_children():
        process.join(20)
        assert process.exitcode is not None


def test_a_written_clip_is_h264_and_shows_the_scene(tmp_path):
    for scene in SCENES[:3]:
        path = tmp_path / f"{scene.seed}.mp4"
        write_clip(scene, path)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 48, 48)
            assert float(stream.duration * stream.time_base) == pytest.approx(DURATION)
            frames = {
                float(f.time): f.to_ndarray(format="rgb24").astype(int) for f in container.decode(stream)
            }
        assert len(frames) == FPS * DURATION
        for thing in scene.things:
            for t, frame in frames.items():
                shown = abs(draw_frame(scene, t).astype(int) - COLORS[thing.color]).sum(axis=-1) < 60
                assert shown.any() == (thing.start <= t < thing.end)
                if shown.any():
                    (x, y, _), place = thing.at(t), np.argwhere(shown).mean(axis=0)
                    assert abs(place - (y, x)).max() < 3, (thing, t)
                    assert np.argmin(
                        [abs(frame[shown].max(axis=0) - rgb).sum() for rgb in COLORS.values()]
                    ) == list(COLORS).index(thing.color), (thing, t)


def test_one_scene_gives_one_file_byte_for_byte(tmp_path):
    for scene in map(
        make_scene, (7, 100, 101)
    ):  # of scene 7 some x264 code makes two kinds of file, by chance
        contents = set()
        for i in range(10):
            write_clip(scene, tmp_path / f"{i}.mp4")
            contents.add((tmp_path / f"{i}.mp4").read_bytes())
        assert len(contents) == 1, scene


def test_two_may_draw_one_world_at_the_same_time(tmp_path):
    both = multiprocessing.get_context("fork")
    runs = [both.Process(target=world.make_world, args=(tmp_path / "a", range(6), 1)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    world.make_world(tmp_path / "b", range(6), workers=2)
    alone = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert len(alone) == 7 and alone == {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}


def test_a_drawn_world_is_not_written_to_and_leftovers_of_killed_drawings_go(tmp_path):
    def states():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    world.make_world(tmp_path, range(3), workers=1)
    drawn = states()
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    (tmp_path / f"clip0000009.mp4.{ended.pid}.{place()}0123abcd.tmp").write_bytes(b"half")
    (tmp_path / f"clip0000008.mp4.{os.getpid()}.{place()}0123abcd.tmp").write_bytes(b"being written")
    world.make_world(tmp_path, range(3), workers=1)
    left = states()
    assert left.pop(f"clip0000008.mp4.{os.getpid()}.{place()}0123abcd.tmp") and left == drawn


def test_corpus_faults_are_the_stated_ones():
    rng, seen = random.Random(0), defaultdict(Counter)
    for row in [row for rows in QUESTIONS for row in rows] * 4:
        category, given = row["category"], world.corpus_answer(row, rng)
        usual = world.USUAL_ANSWER.get(category)
        loose = dict.fromkeys(world.LOOSE_ANSWERS[category], "loose")
        kinds = {row["answer"]: "right", usual: "usual"} | loose
        assert world.corpus_answer(row, rng, faults=False) == row["answer"]
        seen[category]["all"] += 1
        seen[category]["says usual"] += given == usual
        if row["answer"] != usual:
            seen[category]["other"] += 1
            seen[category][kinds[given]] += 1
    for category, count in seen.items():
        usual = category.startswith(("Temporal", "Action"))
        shares = (0.5, 0.1, 0.4) if usual else (0, 0.35, 0.65)
        for kind, share in zip(("usual", "loose", "right"), shares, strict=True):
            assert count[kind] / count["other"] == pytest.approx(share, abs=0.03), (category, kind)
        assert not usual or count["says usual"] / count["all"] >= 0.5, category


def test_annotations_give_the_answer_of_every_question_in_other_words():
    reworded = {
        "Object Recognition": "kind {}", "Attribute Perception": "color {}",
        "Action Recognition": "action {}", "Temporal Reasoning": "{1} {0}",
        "Temporal Grounding": "times {}", "Spatial Perception": "place {}", "Action Reasoning": "color {}",
        "Counting Problem": "number objects", "Temporal Perception": "color {}",
        "Spatial Reasoning": "{3} from {0}",
    }  # fmt: skip
    verbs = {"stays still": "still", "grows": "grows"}
    for scene, rows in zip(SCENES, QUESTIONS, strict=True):
        said = dict(world.annotations(scene))
        assert not said.keys() & {row["question"] for row in rows}
        for row in rows:
            words = row["question"].split()[::-1]
            prompt = reworded[row["category"]].format(verbs.get(words[0], words[0]), *words[1:])
            assert said[prompt] == row["answer"].removesuffix(" seconds"), (prompt, row)


def test_the_vocabulary_has_every_word():
    tokenizer = WordTokenizer(world.vocabulary())
    texts = [row[key] for rows in QUESTIONS for row in rows for key in ("question", "answer")]
    texts += [text for scene in SCENES for pair in world.descriptions(scene) for text in pair]
    texts += [text for scene in SCENES for pair in world.annotations(scene) for text in pair]
    texts += [world.frame_caption(s, 1.6, wrong) for s in SCENES for wrong in (None, random.Random(s.seed))]
    texts += [world.frame_caption(s, 1.6, actions=True) for s in SCENES]
    texts += [text for loose in world.LOOSE_ANSWERS.values() for text in loose]
    for text in {*texts, *world.USUAL_ANSWER.values()}:
        spelled = [i for i in tokenizer.encode(text) if i < FIRST_BYTE + 256]
        assert tokenizer.decode(spelled) in ("", "?", ":"), text  # one byte each, and no word is spelled out
    assert tokenizer.vocab_size <= 512


# ---- grounded questions


def asked_of(scenes):
    return [(scene, row) for scene in scenes for row in world.grounded_questions(scene, f"{scene.seed}.mp4")]


TWINS = [twin for scene in SCENES if (twin := world.twins(scene))]


@functools.cache
def seen_alone(scene):
    """(name, start, end, what it does, kind) of each thing, by appearance, by the pixels of that thing drawn
    alone; which is which comes from the scene."""
    seen, alike = [], len({o.color for o in scene.things}) < len(scene.things)
    for o in scene.things:
        (track,) = watch(Scene((o,), scene.background, scene.seed)).values()
        name = o.kind if alike else o.color
        seen.append((name, track[0][0], track[-1][0] + 1 / FPS, action(track), o.kind))
    return sorted(seen, key=lambda thing: thing[1])


def grounded_truth(row, seen):
    """(answer, start, end) of a question."""
    names, words = [thing[0] for thing in seen], row["question"].split()
    named = sorted((name for name in names if name in words), key=words.index)
    among = [thing for thing in seen if thing[0] in named]
    if words[0] == "when":
        return None, max(thing[1] for thing in among), min(thing[2] for thing in among)
    if words[1] in ("is", "does"):
        (thing,) = among
        return thing[3 if words[1] == "does" else 4], *thing[1:3]
    if "after" in words:
        among = seen[names.index(named[0]) + 1 :]
    elif not named:
        among = seen
    if "stays" not in words:
        thing = among[-1 if "last" in words else 0]
    else:
        most = max if {"longer", "longest"} & set(words) else min
        thing = most(among, key=lambda thing: thing[2] - thing[1])
        assert sum(abs(t[2] - t[1] - thing[2] + thing[1]) < 0.01 for t in among) == 1, "a tie was asked about"
    return thing[0], *thing[1:3]


def test_every_grounded_answer_and_span_is_what_the_pixels_show():
    checked = Counter()
    for scene, row in asked_of(SCENES[:50] + TWINS[:30]):
        said, start, end = grounded_truth(row, seen_alone(scene))
        assert row["span"] == pytest.approx([start, end]), (scene, row)
        assert row["answer"] == (said or f"{row['span'][0]} to {row['span'][1]} seconds"), (scene, row)
        checked[row["category"]] += 1
    kinds = "Recognition", "Action", "Order", "Duration", "Order and Duration"
    assert set(checked) == {"Distractor Grounding", *(f"Grounded {kind}" for kind in kinds)}
    assert min(checked.values()) >= 5, checked


def test_distractors_overlap_or_touch_the_interval_asked_for_and_differ_from_it():
    relations = Counter()
    for scene in TWINS:
        a, b = scene.things[:2]
        assert a.color == b.color and a.kind != b.kind and (a.start, a.end) != (b.start, b.end)
        relations["touch" if b.start == a.end else "overlap" if b.start < a.end else "apart"] += 1
        rows = [row for row in world.grounded_questions(scene, "a.mp4") if " and " not in row["question"]]
        assert [row["span"] for row in rows] == [[a.start, a.end], [b.start, b.end]]
    assert min(relations["touch"], relations["overlap"]) > len(TWINS) / 10, relations
    assert not relations["apart"], relations


def test_duration_does_not_follow_from_order():
    """Else "what stays longest" would be another wording of "what appears first"."""
    first = Counter()
    for scene, row in asked_of(SCENES):
        if row["category"] == "Grounded Duration":
            first[row["answer"] == scene.things[0].color] += 1
    assert min(first.values()) > 0.35 * sum(first.values()), first


def test_grounded_questions_are_read_and_paid_as_grounded_ones(tmp_path):
    rows = [row for _, row in asked_of(SCENES[:60] + TWINS[:60])]
    rows = list({row["id"]: row for row in rows}.values())
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row, question in zip(rows, load_questions(str(tmp_path / "g.jsonl"), ""), strict=True):
        grounding = row["category"] == "Distractor Grounding"
        assert task(question) == ("grounding" if grounding else "grounded")
        parts = reward(world.grounded_answer(row), question)
        assert (parts.discrete, parts.continuous, parts.format) == (None if grounding else 1, 1, 1)
        if " of " in row["question"]:  # both are named in the question: neither the other nor both is right
            a, b = re.search(r"of (\w+) and (\w+) and when", prompt_text(question)).groups()
            right = {said: is_correct(f"{said} 0.0 to 1.0 seconds", question) for said in (a, b, f"{a} {b}")}
            assert [said for said, ok in right.items() if ok] == [row["answer"]]


def test_the_default_world_is_what_it_was_before_grounded_questions():
    """Scenes, questions, captions and words, from which the shipped weights were made, by their hash."""
    known, pixels = hashlib.sha256(), 0
    for scene in map(make_scene, range(200)):
        known.update(repr(scene).replace(", duration=4.0)", ")").encode())
        texts = [make_questions(scene, "a.mp4"), list(world.annotations(scene))]
        texts += [list(world.descriptions(scene)), world.frame_caption(scene, 1.0)]
        known.update(json.dumps(texts).encode())
        if scene.seed < 8:
            pixels += sum(int(draw_frame(scene, t).sum(dtype="int64")) for t in (0.5, 1.5, 2.5))
    known.update(" ".join(world.vocabulary()).encode())
    assert known.hexdigest() == "f947ee1cf0365ac6b9f32e44549326c44b1091cb8b4f813a27755d163ceb1cce"
    assert pixels == pytest.approx(8862902, abs=200)  # of 166 thousand values, whose rounding may differ


def test_grounded_questions_have_a_file_and_clips_of_their_own(tmp_path):
    plain = world.make_world(tmp_path / "a", range(3), workers=1)
    grounded = world.make_world(tmp_path / "a", range(3), workers=1, grounded=True)
    again = world.make_world(tmp_path / "b", range(3), workers=1)
    assert open(plain).read() == open(again).read()
    rows = [json.loads(line) for line in open(grounded)]
    assert {row["video"] for row in rows} == {path.name for path in (tmp_path / "a").glob("*.mp4")}
    assert any(row["video"].startswith("twins") for row in rows)
    spelled = WordTokenizer(world.vocabulary()).encode(" ".join(world.grounded_answer(row) for row in rows))
    assert min(spelled) >= FIRST_BYTE + 256  # answers are words of the default tokenizer


def answer_by_sight(row, seen, order, moving):
    """The right answer by what was seen of each colour; None to what the default world asks too."""
    question = row["question"]
    if row["category"] == "Order":
        return order[1 if "second" in question else 2]
    if row["category"] == "Duration":
        most = max if "longest" in question else min
        return most(seen, key=lambda color: len(seen[color]))
    if "moves" in question and row["category"] == "Counting Problem":
        return NUMBERS[moving]
    if question.startswith("how many objects appear before"):
        return NUMBERS[order.index(question.split()[-1])]
    return None


def test_hard_questions_are_answered_by_what_is_drawn():
    """From the pictures alone: when each colour is first seen, how long, and whether its centre moves."""
    checked = Counter()
    for scene in [make_scene(seed, hard=True) for seed in range(60)]:
        assert 3 <= len(scene.things) <= 4 and scene.duration == HARD_DURATION
        seen, centres = defaultdict(list), defaultdict(list)
        for i in range(round(FPS * scene.duration)):
            frame = draw_frame(scene, i / FPS).astype(int)
            for color, rgb in COLORS.items():
                shown = abs(frame - rgb).sum(axis=2) < 60
                if shown.sum() >= 5:
                    seen[color].append(i)
                    centres[color].append(np.argwhere(shown).mean(axis=0))
        order = sorted(seen, key=lambda color: seen[color][0])
        moving = sum(max(abs(c[-1] - c[0])) > 12 for c in centres.values())
        for row in world.hard_questions(scene, "a.mp4"):
            wanted = answer_by_sight(row, seen, order, moving)
            assert wanted in (None, row["answer"])
            checked[row["category"]] += wanted is not None
    assert min(checked[name] for name in ("Order", "Duration", "Counting Problem")) > 50
    ids = [row["id"] for row in world.hard_questions(make_scene(3, hard=True), "a.mp4")]
    assert len(ids) == len(set(ids))


def test_the_hard_world_leaves_the_default_one_as_it_is(tmp_path):
    assert make_scene(7) != world.make_scene(7, hard=True) == world.make_scene(7, hard=True)
    path = world.make_world(tmp_path / "hard", range(2), workers=1, hard=True)
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    assert {"Order", "Duration"} <= {row["category"] for row in rows}
    assert [q["question"] for q in make_questions(make_scene(7), "a.mp4")][:3] == [
        "what is the object in green", "what color is the net", "what does the thing do that is green",
    ]  # fmt: skip


def test_both_worlds_lie_in_one_folder_and_the_ranker_learns_from_the_one_that_is_asked_for(tmp_path):
    options = {"pairs": "", "world_dir": tmp_path / "w", "ranker_clips": 1}
    options |= {"pairs_per_question": 4, "error_rate": 0.0, "seed": 0}
    found = {}
    for name in ("default", "hard"):
        pairs = pairs_to_learn(SimpleNamespace(world=name, **options))
        found[name] = (
            {pair.video for pair in pairs},
            any("second" in p.question or "third" in p.question for p in pairs),
        )
    assert found["hard"][1] and not found["default"][1]
    assert not found["hard"][0] & found["default"][0]


def test_questions_of_ones_own_are_not_replaced(tmp_path):
    for grounded, name in ((False, "questions.jsonl"), (True, "grounded.jsonl")):
        path = tmp_path / name
        rows = [json.loads(line) for line in open(world.make_world(tmp_path, range(2), 1, grounded))]
        world.make_world(tmp_path, range(1), 1, grounded)  # the world's own rows go
        path.write_text(mine := json.dumps(rows[0] | {"id": "mine-1"}) + "\n")
        with pytest.raises(BadInput, match=f"{name}: holds other questions .*; rename it"):
            world.make_world(tmp_path, range(2), 1, grounded)
        assert path.read_text() == mine


def kill_worker(*given):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_drawing_process_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "_make_one", kill_worker)
    with pytest.raises(BadInput, match="a drawing process was killed; run again"):
        world.make_world(tmp_path, range(2), workers=1)


def wait_with_children(*given):
    print("begun", flush=True)
    time.sleep(60)


def test_drawing_processes_end_with_the_one_that_started_them(tmp_path):
    code = "import test_world; from videoqa import world; world._make_one = test_world.wait_with_children"
    code += f"; world.make_world({str(tmp_path)!r}, range(2), workers=2)"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [sys.executable, "-c", code]
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}) as run:
            begun = [run.stdout.readline() for _ in range(2)]
            run.send_signal(number)
            killed = time.monotonic()
            assert all(begun) and not run.stdout.read()  # ends as the last that could write there does
            assert time.monotonic() - killed < 30


def test_grounded_questions_say_their_own_clips_duration():
    for hard, duration in ((False, DURATION), (True, HARD_DURATION)):
        rows = world.grounded_questions(make_scene(7, hard), "a.mp4")
        assert {row["duration"] for row in rows} == {duration}
