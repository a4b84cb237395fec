import json
import multiprocessing
import os
import pickle
import random
import struct
import threading
from fractions import Fraction

import av
import av.logging
import numpy as np
import pytest
import torch

from videoqa import video
from videoqa.questions import check_video, load_questions

REAL_CLIPS = os.environ.get("REAL_CLIPS", "")
needs_real_clips = pytest.mark.skipif(not os.path.isdir(REAL_CLIPS), reason="REAL_CLIPS names no folder")


def write_video(path, all_pts, codec="libx264", gop=20, fps=10, size=(64, 64), sound=0, noise=0, **options):
    """A file whose frames carry their index as 16 black or white squares: bit b in square b, row by row.

    sound: seconds of silence beside them, from 0 on. noise: grey levels, so that packets are larger.
    """
    if codec == "libx264":
        options = {"preset": "veryfast", "crf": "20"} | options  # B-frames stay on: they unorder the packets
    muxer = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    first = options.pop("first", 0)
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size, stream.codec_context.time_base = "yuv420p", gop, Fraction(1, fps)
        silence = container.add_stream("aac", rate=16000) if sound else None
        packets = []
        for index, pts in enumerate(all_pts, start=first):
            pixels = picture_of(index, size)
            if noise:
                pixels = np.maximum(pixels, np.random.default_rng(index).integers(0, noise, pixels.shape))
            frame = av.VideoFrame.from_ndarray(
                np.stack([pixels] * 3, axis=2).astype(np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = pts, Fraction(1, fps)
            packets += stream.encode(frame)
        packets += stream.encode()
        for i in range(int(sound * 16000 / 1024)):
            packets += silence.encode(silent_frame(i))
        packets += silence.encode() if sound else []
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return str(path)


def picture_of(index, size=(64, 64)):
    bits = np.array([index >> b & 1 for b in range(16)], np.uint8).reshape(4, 4) * 255
    return np.kron(bits, np.ones((size[1] // 4, size[0] // 4), np.uint8))


def silent_frame(i):
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * i, Fraction(1, 16000)
    return frame


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


def count_decoding(monkeypatch, decoding=lambda packet: None):
    """Counts packets read and frames decoded from now on. decoding: called with each packet before it is."""
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
            decoding(self.real)
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
    # With B-frames it states 6.3 s, so the end is put behind the last picture: 7.9 s and an average 0.42 s.
    frames, times = video.read_frames(write_video(tmp_path / "reordered.mp4", pts), 4, 32)
    assert [index_of(frame) for frame in frames] == [8, 9, 11, 13]
    torch.testing.assert_close(times, torch.tensor([0.8, 2.0, 4.1, 6.1]), atol=1e-6, rtol=0)


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


# ---- what containers say ----


def shown(path, k, **part):
    return [index_of(frame) for frame in video.read_frames(path, k, 32, **part)[0]]


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv", "ts", "flv"])
def test_time_counts_from_the_start_of_the_file_in_every_container(tmp_path, kind):
    # Pictures begin 5 s after the sound, whose encoder runs in for up to 0.07 s: 6 to 9 s are pictures 10 to
    # 39, the middles of five parts 13, 19, 25, ..
    path = write_video(tmp_path / f"late.{kind}", range(50, 150), sound=15)
    assert shown(path, 5, start=6.08, end=9.08) == [13, 19, 25, 31, 37]
    assert shown(path, 2, end=14.76) == [0, 60]  # 3.69 and 11.07 s
    assert check_video(path)["ok"]


@pytest.mark.parametrize("kind", ["mp4", "mkv", "flv", "ts", "avi"])
def test_the_last_picture_stays_while_the_sound_goes_on(tmp_path, kind):
    path = write_video(tmp_path / f"slides.{kind}", (0, 100, 200), sound=30, bf="0")
    assert shown(path, 8) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert check_video(path)["ok"]
    path = write_video(tmp_path / f"still.{kind}", [0], sound=20, bf="0")
    assert shown(path, 4) == [0, 0, 0, 0] and check_video(path)["ok"]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_avi_shows_each_picture_at_its_own_time(tmp_path, codec, b_frames):
    path = write_video(tmp_path / "a.avi", range(60), codec, fps=1, gop=12, bf=b_frames)
    frames, times = video.read_frames(path, 8, 32)
    assert [index_of(frame) for frame in frames] == times.tolist() == [3, 11, 18, 26, 33, 41, 48, 56]


def test_the_stream_read_is_the_one_that_ffmpeg_takes_for_the_best(tmp_path):
    path = str(tmp_path / "two.mp4")
    with av.open(path, "w") as container:
        small, main = (container.add_stream("libx264", rate=10) for _ in range(2))
        small.disposition, main.disposition = av.stream.Disposition(0), av.stream.Disposition.default
        for stream, side in ((small, 64), (main, 128)):
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for i in range(40):
            for stream, offset in ((small, 100), (main, 0)):
                pixels = picture_of(i + offset, (stream.width, stream.height))
                frame = av.VideoFrame.from_ndarray(np.stack([pixels] * 3, axis=2), format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
        container.mux(small.encode() + main.encode())
    assert shown(path, 4) == [5, 15, 25, 35]


# ---- faults ----


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for i in range(8):
            container.mux(stream.encode(silent_frame(i)))
        container.mux(stream.encode())


def make_broken(path, fault):
    match fault:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("this is no video\n" * 40)
        case "audio only":
            audio_only(path)
        case "no index":
            whole = open(write_video(path, range(40)), "rb").read()
            path.write_bytes(whole[: whole.index(b"moov") - 4])
        case "cut short":
            whole = open(write_video(path, range(200), movflags="faststart"), "rb").read()
            path.write_bytes(whole[: len(whole) * 2 // 3])
        case "cut short, Matroska":
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
    report = check_video(path)
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
    report = check_video(path)
    assert not report["ok"] and ("damaged" in report["reason"] or "cannot be decoded" in report["reason"])


@pytest.fixture(scope="module")
def bulky(tmp_path_factory):
    """Container -> bytes of 10 s with noise, a key frame a second."""
    folder = tmp_path_factory.mktemp("bulky")
    options = {"mp4": {"movflags": "faststart"}}
    return {
        kind: open(
            write_video(folder / f"a.{kind}", range(100), gop=10, noise=60, **options.get(kind, {})), "rb"
        ).read()
        for kind in ("mp4", "mkv", "flv", "avi", "ts")
    }


@pytest.mark.parametrize("kind", ["mp4", "mkv", "flv", "avi", "ts"])
def test_a_file_that_has_lost_a_part_is_refused(bulky, tmp_path, kind):
    whole, path = bulky[kind], tmp_path / f"a.{kind}"
    n = len(whole)
    path.write_bytes(whole)
    assert shown(path, 4) == [12, 37, 62, 87] and check_video(path)["ok"]
    middle = slice(n * 35 // 100, n * 65 // 100)
    for lost in (whole[: n // 5], whole[: n * 85 // 100], whole[: middle.start] + whole[middle.stop :]):
        path.write_bytes(lost)
        assert not check_video(path)["ok"], len(lost)
        with pytest.raises(video.VideoError):
            video.read_frames(path, 8, 32)


def test_a_second_cut_to_three_fifths_is_refused(tmp_path):
    for kind in ("mkv", "flv", "avi", "ts"):
        path = tmp_path / f"a.{kind}"
        whole = open(write_video(path, range(10), noise=60), "rb").read()
        assert shown(path, 5) == [1, 3, 5, 7, 9] and check_video(path)["ok"]
        path.write_bytes(whole[: len(whole) * 3 // 5])
        assert not check_video(path)["ok"]
        with pytest.raises(video.VideoError):
            video.read_frames(path, 5, 32)


def test_a_live_recording_cut_short_is_refused(bulky, tmp_path):
    path = tmp_path / "live.mkv"
    whole = bytearray(bulky["mkv"])
    at = whole.index(b"\x44\x89\x88")  # Matroska's duration, then 8 bytes; 0xEC: an element without meaning
    whole[at : at + 11] = b"\xec\x89" + bytes(9)
    tag = whole.index(b"DURATION")
    whole[tag : tag + 8] = b"NOTHINGS"
    path.write_bytes(whole[: whole.index(b"\x1c\x53\xbb\x6b", len(whole) // 2)])  # without the index behind
    assert shown(path, 4) == [12, 37, 62, 87]
    path.write_bytes(whole[: len(whole) // 2])
    assert not check_video(path)["ok"]
    with pytest.raises(video.VideoError, match="cut short"):
        video.read_frames(path, 4, 32)


def test_a_stated_duration_of_thousands_of_digits_is_passed_over(tmp_path):
    with av.open(write_video(tmp_path / "a.mkv", range(4))) as container:
        container.streams.video[0].metadata["DURATION"] = "9" * 5000 + ":00:00.0"
        assert video._Source("a.mkv", container, container.streams.video[0], []).stated_end is None


@pytest.mark.parametrize(
    "kind, codec", [("ts", "libx264"), ("mkv", "libx264"), ("flv", "libx264"), ("mpg", "mpeg2video")]
)
def test_recordings_laid_end_to_end_are_refused(tmp_path, kind, codec):
    parts = [
        write_video(tmp_path / f"{i}.{kind}", range(50), codec, fps=25, first=50 * i, bf="2") for i in (0, 1)
    ]
    assert check_video(parts[1])["ok"]
    path = tmp_path / f"joined.{kind}"
    path.write_bytes(b"".join(open(part, "rb").read() for part in parts))
    assert not check_video(path)["ok"]
    with pytest.raises(video.VideoError):
        video.read_frames(path, 8, 32)


def test_a_damaged_reference_behind_the_chosen_frame_is_noticed(tmp_path):
    path = write_video(
        tmp_path / "a.mp4", range(40), gop=40, noise=60, **{"x264-params": "bframes=3:b-adapt=0"}
    )
    with av.open(path) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.pts is not None]
    order = [round(p.pts * p.time_base * 10) for p in packets]
    behind = next(i for i in range(1, 40) if order[i] > max(order[:i]) + 1)  # frames before it follow it
    chosen = max(order[:behind]) + 1  # a B-frame, decoded after that reference and shown before it
    assert order.index(chosen) > behind and order[behind] > chosen + 1  # with yet another in between
    content = bytearray(open(path, "rb").read())
    reference = packets[behind]
    content[reference.pos + 40 : reference.pos + reference.size] = b"\xff" * (reference.size - 40)
    open(path, "wb").write(content)
    with pytest.raises(video.VideoError, match="damaged"):
        video.read_frames(path, 1, 32, start=chosen / 10, end=chosen / 10 + 0.1)


def test_a_list_of_files_is_no_video_and_pictures_have_a_bound(tmp_path):
    write_video(tmp_path / "a.ts", range(10))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.ts\n")
    side = (16000).to_bytes(2, "little")
    gif = b"GIF89a" + side * 2 + b"\x80\0\0\0\0\0\xff\xff\xff!\xf9\4\0\0\0\0\0,\0\0\0\0" + side * 2
    (tmp_path / "large.gif").write_bytes(gif + b"\0\2\2\x44\1\0;")
    for name, cause in (("list.mp4", "a list of other files"), ("large.gif", "larger than 8192x8192")):
        with pytest.raises(video.VideoError, match=cause):
            video.read_frames(tmp_path / name, 2, 32)
        assert not check_video(tmp_path / name)["ok"]


def log_error():
    av.logging.log(av.logging.ERROR, "hevc", "CABAC_MAX_BIN : 31")


def log_error_elsewhere():
    thread = threading.Thread(target=log_error)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "log, reason", [(log_error, "1 packets are read or decoded with errors"), (log_error_elsewhere, "")]
)
def test_an_error_that_is_logged_and_not_flagged_is_damage_of_the_video_that_is_decoded(
    minute, monkeypatch, capfd, log, reason
):
    count_decoding(monkeypatch, lambda packet: packet.pts == Fraction(22) / packet.time_base and log())
    assert [index_of(frame) for frame in video.read_frames(minute, 2, 32)[0]] == [150, 450]  # 15 and 45 s
    assert check_video(minute)["reason"] == reason
    if reason:
        with pytest.raises(video.VideoError, match="damaged before 22.50 s"):
            video.read_frames(minute, 4, 32)
    else:
        assert video.read_frames(minute, 4, 32)[0].shape == (4, 3, 32, 32)
    assert not any(capfd.readouterr())


@needs_real_clips
@pytest.mark.parametrize(
    ("clip", "flips", "words"),
    [
        *(("h265_video.mp4", x, "before") for x in ({8320: 128}, {2526: 64, 8699: 16}, {8263: 2})),
        *(("flipping_a_pancake.mkv", x, "Element at") for x in ({0x64: 0x80}, {0x66: 0x3F}, {0x67: 0x80})),
    ],
)
def test_bits_whose_damage_ffmpeg_only_logs_are_noticed_in_pictures_and_in_the_head(
    tmp_path, clip, flips, words
):
    with open(os.path.join(REAL_CLIPS, "clips", clip), "rb") as file:
        content = bytearray(file.read())
    for at, bits in flips.items():
        content[at] ^= bits
    (tmp_path / clip).write_bytes(content)
    with pytest.raises(video.VideoError, match=f"damaged.* {words}"):
        video.read_frames(tmp_path / clip, 8, 112)
    assert not check_video(tmp_path / clip)["ok"]


@needs_real_clips
def test_damage_is_noticed_every_time(tmp_path):
    """With several decoding threads 4 of 12 readings of this file went through."""
    with open(os.path.join(REAL_CLIPS, "clips", "demo_spatiotemporal_det.mp4"), "rb") as file:
        content = bytearray(file.read())
    content[178860:178924] = random.Random(4).randbytes(64)
    (tmp_path / "a.mp4").write_bytes(content)
    for _ in range(12):
        with pytest.raises(video.VideoError, match="damaged"):
            video.read_frames(tmp_path / "a.mp4", 8, 64)


def test_threads_that_log_an_error_do_not_stop_the_reader_for_ever(tmp_path):
    path = write_video(tmp_path / "a.mp4", range(30), size=(320, 320), noise=60)
    content = bytearray(open(path, "rb").read())
    for at in range(len(content) // 4, len(content), 500):
        content[at] ^= 0x55
    open(path, "wb").write(content)

    def read_with_log():
        av.logging.set_level(av.logging.ERROR)
        with av.logging.Capture(local=False):
            for _ in range(5):
                with pytest.raises(video.VideoError):
                    video.read_frames(path, 8, 32)

    reader = multiprocessing.get_context("fork").Process(target=read_with_log)
    reader.start()
    reader.join(30)
    stopped = reader.exitcode
    reader.kill()
    assert stopped == 0


def test_sound_video_is_reported_with_its_facts(minute):
    facts = dict(frames=600, fps=10.0, duration=60.0, codec="h264", width=64, height=64)
    assert check_video(minute) == {"ok": True, "reason": "", **facts}


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
