import json
import os
import pickle
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from data import load_questions
from videoqa import video

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

        def demux(self):
            for packet in self.real.demux():
                counts["packets"] += 1
                yield Counting(packet)

        def decode(self):
            frames = self.real.decode()
            counts["frames"] += len(frames)
            return frames

    real_open = av.open
    monkeypatch.setattr(video.av, "open", lambda *args, **options: Counting(real_open(*args, **options)))
    return counts


@pytest.fixture(scope="module")
def minute(tmp_path_factory):
    """60 s, 600 frames, a key frame every 2 s."""
    return write_video(tmp_path_factory.mktemp("minute") / "minute.mp4", range(600))


# ---- frames ----


def test_frame_indices_of_the_paper():
    assert video.frame_indices(300, 5) == [0, 74, 149, 224, 299]
    assert video.frame_indices(10, 50) == list(range(10))
    assert video.frame_indices(1, 8) == [0]


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
    monkeypatch.setattr(video, "SEEK_SECONDS", 1.5)  # so that a short file is sought as well
    for k in (1, 3, 8, 200):
        indices, times = shown_by_definition(path, k)
        frames, got_times = video.read_frames(path, k, 32)
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
    frames, times = video.read_frames(path, 4, 32)  # 8 s in 4 parts: centres at 1, 3, 5, 7 s
    assert [index_of(frame) for frame in frames] == [8, 9, 11, 13]
    torch.testing.assert_close(times, torch.tensor([0.8, 2.0, 4.1, 6.1]), atol=1e-6, rtol=0)
    path = write_video(tmp_path / "reordered.mp4", pts)
    assert [index_of(frame) for frame in video.read_frames(path, 7, 32)[0]] == shown_by_definition(path, 7)[0]


def test_frame_at_exactly_the_target_is_the_one_on_show(tmp_path):
    frames, times = video.read_frames(write_video(tmp_path / "a.mp4", range(32), fps=8), 8, 32)
    assert [index_of(frame) for frame in frames] == [2, 6, 10, 14, 18, 22, 26, 30]
    assert times.tolist() == [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75]


def test_fewer_frames_than_asked_for_are_repeated_with_their_times(tmp_path):
    frames, times = video.read_frames(write_video(tmp_path / "three.mp4", range(3)), 6, 32)
    assert [index_of(frame) for frame in frames] == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(times, torch.tensor([0, 0, 0.1, 0.1, 0.2, 0.2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seek_seconds", [10.0, 1e9])
def test_sparse_sampling_decodes_few_frames(minute, monkeypatch, seek_seconds):
    monkeypatch.setattr(video, "SEEK_SECONDS", seek_seconds)
    counts = count_decoding(monkeypatch)
    frames, _ = video.read_frames(minute, 4, 32)
    assert [index_of(frame) for frame in frames] == [75, 225, 375, 525]
    assert counts["frames"] <= 4 * (20 + 8)  # at most a group of pictures and the decoder's delay for each
    if seek_seconds == 10.0:
        assert counts["packets"] < 250  # seeking: most of the file is not even read


def test_of_a_part_only_its_frames_are_chosen_and_their_times_count_from_the_start_of_the_file(
    minute, tmp_path, monkeypatch
):
    counts = count_decoding(monkeypatch)
    frames, times = video.read_frames(minute, 4, 32, start=20.0, end=24.0)
    assert [index_of(frame) for frame in frames] == [205, 215, 225, 235]
    assert times.tolist() == [20.5, 21.5, 22.5, 23.5]
    assert counts["frames"] < 100 and counts["packets"] < 150  # what lies before it is sought over
    late = write_video(tmp_path / "starts_late.ts", range(90))
    for path, start, end in ((minute, 0.05, 0.35), (minute, 59.5, 60.9), (late, 3.0, 5.0)):
        frames, times = video.read_frames(path, 8, 32, "ffmpeg", start, end)
        shown = torch.tensor([index_of(frame) / 10 for frame in frames])
        torch.testing.assert_close(times, shown, atol=1e-4, rtol=0)
        assert start - 0.1 < times[0] and times[-1] < end  # the first may be on show when the part begins
    whole = [video.read_frames(minute, 5, 32, "ffmpeg", *bounds) for bounds in ((), (0.0, 60.0))]
    assert all(torch.equal(a, b) for a, b in zip(*whole, strict=True))


@pytest.mark.parametrize(("start", "end"), [(50.0, 61.5), (70.0, 80.0), (60.5, None)])
def test_a_part_past_the_end_of_the_file_is_an_error(minute, start, end):
    with pytest.raises(video.VideoError, match="it is 60.0 s long, but a part .* ends at"):
        video.read_frames(minute, 4, 32, start=start, end=end)


def test_one_key_frame_in_all_is_decoded_at_most_twice(tmp_path, monkeypatch):
    path = write_video(tmp_path / "one_key.mp4", range(600), gop=1000)
    counts = count_decoding(monkeypatch)
    frames, _ = video.read_frames(path, 4, 32)
    assert [index_of(frame) for frame in frames] == [75, 225, 375, 525]
    assert counts["frames"] <= 2 * 600


def test_shorter_side_is_scaled_and_the_centre_kept(tmp_path):
    # 16 bits over 128x64, index 0b1000_0100_0010_0001: the centre square keeps the middle two columns
    path = write_video(tmp_path / "wide.mp4", range(0b0110_0111), size=(128, 64))
    frame = (
        video.read_frames(path, 103 * 4, 32)[0][-1].float().mean(dim=0)
    )  # the last frame: index 0b0110_0110
    columns = frame.reshape(4, 8, 2, 16).mean(dim=(1, 3)) > 127  # rows of squares, the two middle columns
    assert columns.tolist() == [[True, True], [True, True], [False, False], [False, False]]


def test_rotation_of_the_display_matrix_is_applied(tmp_path):
    path = write_video(tmp_path / "turned.mp4", range(2))  # frame 1 has its first square white: top left
    content = bytearray(open(path, "rb").read())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    open(path, "wb").write(content)
    frame = video.read_frames(path, 2, 32)[0][1].float().mean(dim=0)
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
    with pytest.raises(video.VideoError) as caught:
        video.read_frames(path, 8, 32)
    error = pickle.loads(pickle.dumps(caught.value))  # as it comes back from a worker process
    assert path in str(error) and error.path == path and error.cause in str(error) and "\n" not in str(error)
    assert cause in error.cause and len(error.cause) > 5
    report = video.check_video(path)
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
    with pytest.raises(video.VideoError, match="damaged|cannot read"):
        video.read_frames(path, 4, 32)  # 7.5, 22.5, 37.5, 52.5 s: the second lies in the damaged group
    frames, _ = video.read_frames(path, 2, 32)  # 15 and 45 s: nothing on the way is damaged
    assert [index_of(frame) for frame in frames] == [150, 450]
    report = video.check_video(path)
    assert not report["ok"] and ("damaged" in report["reason"] or "cannot be decoded" in report["reason"])


def test_sound_video_is_reported_with_its_facts(minute):
    facts = dict(frames=600, fps=10.0, duration=60.0, codec="h264", width=64, height=64)
    assert video.check_video(minute) == {"ok": True, "reason": "", **facts}


def test_500_opens_do_not_grow_memory(tmp_path):
    path = write_video(tmp_path / "small.mp4", range(32), size=(48, 48))
    empty = make_broken(tmp_path / "empty.mp4", "text")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")

    def read(times):
        for _ in range(times):
            video.read_frames(path, 8, 48)
            with pytest.raises(video.VideoError):
                video.read_frames(empty, 8, 48)
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = read(100)
    assert read(500) - before < 6e6  # bytes; one leaked decoder is about 50 kB, so 500 would be 25e6


# ---- questions ----


@needs_real_clips
def test_real_clips_give_8_frames_on_show():
    facts = json.load(open(os.path.join(REAL_CLIPS, "clips", "clips_facts.json")))["clips"]
    questions = load_questions(os.path.join(REAL_CLIPS, "real_clips.jsonl"), REAL_CLIPS)
    for path in sorted({question.video for question in questions}):
        frames, times = video.read_frames(path, 8, 56)
        assert frames.shape == (8, 3, 56, 56) and times.shape == (8,)
        all_pts = torch.tensor(facts[os.path.basename(path)]["video"][0]["pts_s"])
        assert (times[:, None] - all_pts).abs().min(dim=1).values.max() < 1e-4
        duration = all_pts.max() + all_pts.max() / max(len(all_pts) - 1, 1)
        centres = (torch.arange(8) + 0.5) * duration / 8
        assert (times.diff() >= 0).all() and (times - centres).abs().max() < 0.3  # s, the longest gap is 0.2


@needs_real_clips
@pytest.mark.parametrize("name", ["video_90.mov", "no_duration.webm", "unordered.mov"])
def test_odd_clips_are_read(name):
    frames, times = video.read_frames(os.path.join(REAL_CLIPS, "clips", name), 8, 56)
    assert frames.shape == (8, 3, 56, 56) and (times.diff() >= 0).all()
