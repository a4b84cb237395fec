import json
import os
import pickle
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from answers import Question, prompt_text

ROOT = os.path.dirname(os.path.abspath(data.__file__))
REAL_CLIPS = os.environ.get("REAL_CLIPS", "")
needs_real_clips = pytest.mark.skipif(not os.path.isdir(REAL_CLIPS), reason="REAL_CLIPS names no folder")


def write_video(path, all_pts, codec="libx264", gop=20, fps=10, size=(64, 64), **options):
    """A file whose frames carry their index as 16 black or white squares: bit b in square b, row by row."""
    if codec == "libx264":
        options = {"preset": "veryfast", "crf": "20"} | options  # B-frames stay on: they unorder the packets
    muxer = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size, stream.codec_context.time_base = "yuv420p", gop, Fraction(1, fps)
        for index, pts in enumerate(all_pts):
            bits = np.array([index >> b & 1 for b in range(16)], np.uint8).reshape(4, 4) * 255
            pixels = np.kron(bits, np.ones((size[1] // 4, size[0] // 4), np.uint8))
            frame = av.VideoFrame.from_ndarray(np.stack([pixels] * 3, axis=2), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def index_of(pixels):
    """(3, size, size) -> the index that the picture carries."""
    side = pixels.shape[-1] // 4
    squares = pixels.float().mean(dim=0).reshape(4, side, 4, side).mean(dim=(1, 3)).flatten()
    return sum(1 << b for b in range(16) if squares[b] > 127)


def shown_by_definition(path, k):
    """Slow and plain: decode all, and for each target take the last frame with pts <= target."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        tick, start = stream.time_base, stream.start_time or 0
        ticks = stream.duration or round(Fraction(container.duration, av.time_base) / tick)
        all_pts = [frame.pts for frame in container.decode(stream)]
    indices = []
    for i in range(k):
        target = start + (2 * i + 1) * ticks // (2 * k)
        indices.append(max([j for j, pts in enumerate(all_pts) if pts <= target], default=0))
    return indices, [float((all_pts[i] - start) * tick) for i in indices]


def count_decoding(monkeypatch):
    """Counts packets read and frames decoded from now on."""
    counts = {"packets": 0, "frames": 0}

    class Counting:
        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            return getattr(self.real, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.real.close()

        def demux(self, stream):
            for packet in self.real.demux(stream):
                counts["packets"] += 1
                yield Counting(packet)

        def decode(self):
            frames = self.real.decode()
            counts["frames"] += len(frames)
            return frames

    real_open = av.open
    monkeypatch.setattr(data.av, "open", lambda *args, **options: Counting(real_open(*args, **options)))
    return counts


@pytest.fixture(scope="module")
def minute(tmp_path_factory):
    """60 s, 600 frames, a key frame every 2 s."""
    return write_video(tmp_path_factory.mktemp("minute") / "minute.mp4", range(600))


# ---- frames ----


def test_frame_indices_of_the_paper():
    assert data.frame_indices(300, 5) == [0, 74, 149, 224, 299]
    assert data.frame_indices(10, 50) == list(range(10))
    assert data.frame_indices(1, 8) == [0]


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("h264.mp4", "libx264", {}),
        ("open_gop.mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:b-adapt=0"}),
        ("intra_refresh.mp4", "libx264", {"x264-params": "intra-refresh=1"}),
        ("h264.mkv", "libx264", {}),
        ("starts_late.ts", "libx264", {}),
        ("vp9.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
        ("hevc.mp4", "libx265", {"preset": "ultrafast", "x265-params": "log-level=none"}),
        ("av1.mp4", "libsvtav1", {"preset": "12"}),
    ],
)
def test_frames_are_those_on_show_in_every_container(tmp_path, monkeypatch, name, codec, options):
    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    path = write_video(tmp_path / name, range(90), codec, gop=12, **options)
    monkeypatch.setattr(data, "SEEK_SECONDS", 1.5)  # so that a short file is sought as well
    for k in (1, 3, 8, 200):
        indices, times = shown_by_definition(path, k)
        frames, got_times = data.read_frames(path, k, 32)
        assert [index_of(frame) for frame in frames] == indices
        torch.testing.assert_close(got_times, torch.tensor(times), atol=1e-6, rtol=0)
    assert (
        frames.shape == (200, 3, 32, 32) and frames.dtype == torch.uint8 and got_times.dtype == torch.float32
    )


def test_variable_frame_rate_is_sampled_by_time_not_by_index(tmp_path):
    # Tenths of a second, the last frame stays for one. No B-frames, as FFmpeg's mp4 writer states a wrong
    # duration where they meet such long steps.
    pts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 20, 40, 41, 60, 61, 79]
    path = write_video(tmp_path / "vfr.mp4", pts, bf="0")
    frames, times = data.read_frames(path, 4, 32)  # 8 s in 4 parts: centres at 1, 3, 5, 7 s
    assert [index_of(frame) for frame in frames] == [8, 9, 11, 13]
    torch.testing.assert_close(times, torch.tensor([0.8, 2.0, 4.1, 6.1]), atol=1e-6, rtol=0)
    path = write_video(tmp_path / "reordered.mp4", pts)
    assert [index_of(frame) for frame in data.read_frames(path, 7, 32)[0]] == shown_by_definition(path, 7)[0]


def test_frame_at_exactly_the_target_is_the_one_on_show(tmp_path):
    frames, times = data.read_frames(write_video(tmp_path / "a.mp4", range(32), fps=8), 8, 32)
    assert [index_of(frame) for frame in frames] == [2, 6, 10, 14, 18, 22, 26, 30]
    assert times.tolist() == [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75]


def test_fewer_frames_than_asked_for_are_repeated_with_their_times(tmp_path):
    frames, times = data.read_frames(write_video(tmp_path / "three.mp4", range(3)), 6, 32)
    assert [index_of(frame) for frame in frames] == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(times, torch.tensor([0, 0, 0.1, 0.1, 0.2, 0.2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seek_seconds", [10.0, 1e9])
def test_sparse_sampling_decodes_few_frames(minute, monkeypatch, seek_seconds):
    monkeypatch.setattr(data, "SEEK_SECONDS", seek_seconds)
    counts = count_decoding(monkeypatch)
    frames, _ = data.read_frames(minute, 4, 32)
    assert [index_of(frame) for frame in frames] == [75, 225, 375, 525]
    assert counts["frames"] <= 4 * (20 + 8)  # at most a group of pictures and the decoder's delay for each
    if seek_seconds == 10.0:
        assert counts["packets"] < 250  # seeking: most of the file is not even read


def test_one_key_frame_in_all_is_decoded_at_most_twice(tmp_path, monkeypatch):
    path = write_video(tmp_path / "one_key.mp4", range(600), gop=1000)
    counts = count_decoding(monkeypatch)
    frames, _ = data.read_frames(path, 4, 32)
    assert [index_of(frame) for frame in frames] == [75, 225, 375, 525]
    assert counts["frames"] <= 2 * 600


def test_shorter_side_is_scaled_and_the_centre_kept(tmp_path):
    # 16 bits over 128x64, index 0b1000_0100_0010_0001: the centre square keeps the middle two columns
    path = write_video(tmp_path / "wide.mp4", range(0b0110_0111), size=(128, 64))
    frame = (
        data.read_frames(path, 103 * 4, 32)[0][-1].float().mean(dim=0)
    )  # the last frame: index 0b0110_0110
    columns = frame.reshape(4, 8, 2, 16).mean(dim=(1, 3)) > 127  # rows of squares, the two middle columns
    assert columns.tolist() == [[True, True], [True, True], [False, False], [False, False]]


def test_rotation_of_the_display_matrix_is_applied(tmp_path):
    path = write_video(tmp_path / "turned.mp4", range(2))  # frame 1 has its first square white: top left
    content = bytearray(open(path, "rb").read())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    open(path, "wb").write(content)
    frame = data.read_frames(path, 2, 32)[0][1].float().mean(dim=0)
    assert frame[:8, 24:].mean() > 200 and frame[:8, :8].mean() < 50  # a quarter turn clockwise: top right


# ---- faults ----


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_broken(path, fault):
    if fault == "empty":
        path.write_bytes(b"")
    elif fault == "text":
        path.write_text("this is no video\n" * 40)
    elif fault == "audio only":
        audio_only(path)
    elif fault == "no index":
        whole = open(write_video(path, range(40)), "rb").read()
        path.write_bytes(whole[: whole.index(b"moov") - 4])
    elif fault == "cut short":
        whole = open(write_video(path, range(200), movflags="faststart"), "rb").read()
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif fault == "cut short, Matroska":
        whole = open(write_video(path.with_suffix(".mkv"), range(200)), "rb").read()
        path.write_bytes(whole[: len(whole) * 2 // 3])
    return str(path)


@pytest.mark.parametrize(
    "fault, cause",
    [
        ("missing", "no such file"),
        ("empty", "file is empty"),
        ("text", "cannot read it as video"),
        ("audio only", "audio only"),
        ("no index", "cannot read it as video"),
        ("cut short", ""),
        ("cut short, Matroska", "cut short: its pictures end"),
    ],
)
def test_unreadable_file_names_path_and_cause(tmp_path, fault, cause):
    path = make_broken(tmp_path / "broken.mp4", fault)
    with pytest.raises(data.VideoError) as caught:
        data.read_frames(path, 8, 32)
    error = pickle.loads(pickle.dumps(caught.value))  # as it comes back from a worker process
    assert path in str(error) and error.path == path and error.cause in str(error) and "\n" not in str(error)
    assert cause in error.cause and len(error.cause) > 5
    report = data.check_video(path)
    assert not report["ok"] and report["reason"]


@pytest.mark.parametrize("fill", [b"\xff", b"\x00", b"\x55"])
def test_damage_in_the_middle_is_an_error_and_never_a_neighbour(minute, tmp_path, fill):
    with av.open(minute) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.pts is not None]
    content = bytearray(open(minute, "rb").read())
    (key,) = [p for p in packets if p.pts == Fraction(22) / p.time_base]  # the key frame of 22 to 24 s
    assert key.is_keyframe
    content[key.pos + 8 : key.pos + key.size] = fill * (key.size - 8)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    with pytest.raises(data.VideoError, match="damaged|cannot read"):
        data.read_frames(path, 4, 32)  # 7.5, 22.5, 37.5, 52.5 s: the second lies in the damaged group
    frames, _ = data.read_frames(path, 2, 32)  # 15 and 45 s: nothing on the way is damaged
    assert [index_of(frame) for frame in frames] == [150, 450]
    report = data.check_video(path)
    assert not report["ok"] and ("damaged" in report["reason"] or "cannot be decoded" in report["reason"])


def test_sound_video_is_reported_with_its_facts(minute):
    facts = dict(frames=600, fps=10.0, duration=60.0, codec="h264", width=64, height=64)
    assert data.check_video(minute) == {"ok": True, "reason": "", **facts}


def test_500_opens_do_not_grow_memory(tmp_path):
    path = write_video(tmp_path / "small.mp4", range(32), size=(48, 48))
    empty = make_broken(tmp_path / "empty.mp4", "text")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")

    def read(times):
        for _ in range(times):
            data.read_frames(path, 8, 48)
            with pytest.raises(data.VideoError):
                data.read_frames(empty, 8, 48)
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = read(100)
    assert read(500) - before < 6e6  # bytes; one leaked decoder is about 50 kB, so 500 would be 25e6


# ---- questions ----

GOOD = {"id": "a", "video": "v/a.mp4", "question": "What?", "answer": "red"}


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_questions_are_read_with_every_field(tmp_path):
    rows = [
        GOOD | {"options": ["red", "blue"], "answer_index": 0, "category": "Attribute Perception"},
        GOOD | {"id": "b", "span": [1, 2.5], "duration": 9},
        GOOD | {"id": "c", "spans": [[0, 1], [2, 3]], "anything": "else"},
    ]
    a, b, c = data.load_questions(write_lines(tmp_path / "q.jsonl", *rows), "videos")
    video = os.path.join("videos", "v/a.mp4")
    assert a == Question("a", video, "What?", "red", "Attribute Perception", ("red", "blue"), 0)
    assert b == Question("b", video, "What?", "red", spans=((1, 2.5),), duration=9)
    assert c.spans == ((0, 1), (2, 3)) and hash(c) == hash(c)


@pytest.mark.parametrize(
    "row, told",
    [
        ("{not json", "not JSON"),
        ("[1]", "not a JSON object"),
        ({k: v for k, v in GOOD.items() if k != "video"}, "field 'video' is missing"),
        (GOOD | {"question": 7}, "field 'question' is 7"),
        (GOOD | {"answer": " "}, "field 'answer'"),
        (GOOD | {"category": 3}, "field 'category'"),
        (GOOD | {"options": ["a", "b"], "answer_index": 2}, "field 'answer_index' is 2; .* 0 to 1"),
        (GOOD | {"options": ["a", "b"], "answer_index": True}, "field 'answer_index'"),
        (GOOD | {"options": ["a", "b"]}, "field 'answer_index' is missing"),
        (GOOD | {"answer_index": 0}, "field 'options' is missing"),
        (GOOD | {"options": "ab", "answer_index": 0}, "field 'options'"),
        (GOOD | {"span": [1]}, "field 'span' .* two numbers"),
        (GOOD | {"span": ["1", 2]}, "field 'span' .* two numbers"),
        (GOOD | {"span": [3, 2]}, "field 'span' .* after the end"),
        ('{"id": "b", "video": "v", "question": "q", "answer": "a", "span": [NaN, 2]}', "field 'span'"),
        (GOOD | {"spans": []}, "field 'spans'"),
        (GOOD | {"spans": [1, 2]}, "field 'spans' .* list of such pairs"),
        (GOOD | {"span": [1, 2], "spans": [[1, 2]]}, "field 'spans' .* not both"),
        (GOOD | {"duration": 0}, "field 'duration'"),
        (GOOD | {"id": "first"}, "field 'id' repeats that of line 1"),
    ],
)
def test_malformed_line_is_told_with_file_line_and_field(tmp_path, row, told):
    path = write_lines(tmp_path / "q.jsonl", GOOD | {"id": "first"}, "", row)
    with pytest.raises(data.DataError, match=told) as caught:
        data.load_questions(path, "videos")
    assert str(caught.value).startswith(f"{path}, line 3: ") and "\n" not in str(caught.value)


def test_file_without_questions_or_in_another_encoding_is_told(tmp_path):
    with pytest.raises(data.DataError, match="no such file"):
        data.load_questions(str(tmp_path / "none.jsonl"), "videos")
    with pytest.raises(data.DataError, match="holds no question"):
        data.load_questions(write_lines(tmp_path / "empty.jsonl", "", " "), "videos")
    (tmp_path / "latin.jsonl").write_bytes('{"id": "é"}\n'.encode("latin-1"))
    with pytest.raises(data.DataError, match="line 1: not JSON"):
        data.load_questions(str(tmp_path / "latin.jsonl"), "videos")


# ---- the command ----


def run_check(*arguments):
    command = [sys.executable, os.path.join(ROOT, "data.py"), "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_check_lists_every_video_once_and_exits_2(tmp_path):
    write_video(tmp_path / "good.mp4", range(20))
    make_broken(tmp_path / "empty.mp4", "empty")
    videos = ["missing.mp4", "good.mp4", "empty.mp4", "good.mp4"]
    rows = [GOOD | {"id": str(i), "video": video} for i, video in enumerate(videos)]
    done = run_check(write_lines(tmp_path / "q.jsonl", *rows), "--videos", tmp_path)
    missing, good, empty, summary = done.stdout.splitlines()
    assert done.returncode == 2 and done.stderr == ""
    assert missing.startswith("FAIL") and missing.endswith("missing.mp4  no such file")
    assert good.startswith("ok") and good.endswith("20 frames, 10.000 fps, 2.00 s, h264 64x64")
    assert empty.startswith("FAIL") and "empty.mp4  file is empty" in empty
    assert summary == "3 videos: 1 ok, 2 failed"


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


# ---- tokens and batches ----

WORDS = ["the", "cat", "sat", "1.5", "answer", "7", "ü", "("]


@given(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(st.sampled_from([*WORDS, " ", "\n"])).map("".join)
)
def test_decoding_an_encoding_gives_the_text_back(text):
    tokenizer = data.Tokenizer(WORDS)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)  # no text can spell a special token


def test_words_are_one_id_and_the_rest_is_bytes():
    tokenizer = data.Tokenizer(WORDS)
    assert tokenizer.vocab_size == 260 + len(WORDS)
    assert tokenizer.encode("the cat, 1.5") == [260, 261, 4 + ord(","), 263]
    assert tokenizer.encode("cats") == [4 + byte for byte in b" cats"]
    ids = [data.BOS_ID, data.VIDEO_ID, 260, 261, data.EOS_ID, data.PAD_ID]
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode([4 + 0xC3]) == "\ufffd"  # half a character


def test_saved_tokenizer_is_loaded_as_it_was(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    data.Tokenizer(WORDS).save(path)
    assert data.Tokenizer.load(path).words == WORDS and os.listdir(tmp_path) == ["tokenizer.json"]
    assert json.load(open(path, encoding="utf-8")) == {"type": "words+bytes", "words": WORDS}
    (tmp_path / "tokenizer.json").write_text('{"type": "bpe"}')
    with pytest.raises(data.DataError, match="field 'type'"):
        data.Tokenizer.load(path)


def test_prompt_is_begin_video_question_answer():
    tokenizer = data.Tokenizer(WORDS)
    question = Question("a", "v", "the cat?", "red", options=("the", "cat"), answer_index=0)
    prompt = data.build_prompt(tokenizer, question, 5, [0.5])
    assert prompt[:6] == [data.BOS_ID] + [data.VIDEO_ID] * 5
    assert tokenizer.decode(prompt) == prompt_text(question)


def test_prompts_are_padded_left_and_completions_right():
    prompt_ids, prompt_mask = data.collate_prompts([[1, 7], [1, 8, 9]])
    assert prompt_ids.tolist() == [[0, 1, 7], [1, 8, 9]] and prompt_ids.dtype == torch.int64
    assert prompt_mask.tolist() == [[False, True, True], [True, True, True]]
    completion_ids, completion_mask = data.collate_completions([[7, data.EOS_ID], [7, 8, 9], []])
    assert completion_ids.tolist() == [[7, data.EOS_ID, 0], [7, 8, 9], [0, 0, 0]]
    assert completion_mask.tolist() == [[True, True, False], [True, True, True], [False, False, False]]


# ---- real clips ----


@needs_real_clips
def test_real_clips_give_8_frames_on_show():
    facts = json.load(open(os.path.join(REAL_CLIPS, "clips", "clips_facts.json")))["clips"]
    questions = data.load_questions(os.path.join(REAL_CLIPS, "real_clips.jsonl"), REAL_CLIPS)
    for video in sorted({question.video for question in questions}):
        frames, times = data.read_frames(video, 8, 56)
        assert frames.shape == (8, 3, 56, 56) and times.shape == (8,)
        all_pts = torch.tensor(facts[os.path.basename(video)]["video"][0]["pts_s"])
        assert (times[:, None] - all_pts).abs().min(dim=1).values.max() < 1e-4
        duration = all_pts.max() + all_pts.max() / max(len(all_pts) - 1, 1)
        centres = (torch.arange(8) + 0.5) * duration / 8
        assert (times.diff() >= 0).all() and (times - centres).abs().max() < 0.3  # s, the longest gap is 0.2


@needs_real_clips
@pytest.mark.parametrize("name", ["video_90.mov", "no_duration.webm", "unordered.mov"])
def test_odd_clips_are_read(name):
    frames, times = data.read_frames(os.path.join(REAL_CLIPS, "clips", name), 8, 56)
    assert frames.shape == (8, 3, 56, 56) and (times.diff() >= 0).all()


@needs_real_clips
def test_check_names_the_broken_files():
    done = run_check(os.path.join(REAL_CLIPS, "real_clips_with_broken.jsonl"), "--videos", REAL_CLIPS)
    failed = {
        os.path.basename(line.split("  ")[1]) for line in done.stdout.splitlines() if line[:4] == "FAIL"
    }
    names = {"empty.mp4", "text.mp4", "truncated.mp4", "damaged.avi", "audio_only.mp4", "missing.mp4"}
    assert failed == names and done.returncode == 2
