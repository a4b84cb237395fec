"""Frames of a video file, chosen by presentation time, never by index: a variable frame rate or a wrong frame
count in the header cannot shift them. Nothing is substituted: a frame that cannot be decoded cleanly raises
VideoError.
"""

import math
import os
import re
from contextlib import contextmanager
from functools import partial

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image

from plumbing.options import BadInput

CLIP_MEAN_COLOR = (122, 116, 104)  # CLIP's mean of RGB, in 0..255: what LLaVA-1.5 pads with
SEEK_SECONDS = 10.0  # jump to a target farther away than this, else read on: most key frames come more often
SEEK_MARGIN = 1.0  # seconds; some containers index decoding times, which run ahead of presentation times
LATE_SECONDS = 1.0  # a video may end this much before it is said or asked to
SMALL_PIXELS = 256 * 256  # below this, starting decoder threads costs more than they save


class DataError(BadInput):
    """Bad input. The message is one line: file, line and field where known, what is wrong, the remedy."""


class VideoError(DataError):
    """A video that cannot be read as asked. path: the file; cause: one line."""

    def __init__(self, path: str, cause: str):
        super().__init__(path, cause)  # both, or the error could not be pickled back from a worker process
        self.path, self.cause = path, cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}; replace the file or drop its questions"


def frame_indices(num_frames_in_file: int, k: int) -> list[int]:
    """Evenly spread frame indices, both ends included: linspace(0, N-1, k) cut to int, distinct ones only.

    N=300, k=5 -> 0, 74, 149, 224, 299. Returns at most min(N, k) indices, rising.
    """
    assert num_frames_in_file >= 1 and k >= 1, f"need N >= 1 and k >= 1, got {num_frames_in_file} and {k}"
    return sorted({int(i) for i in np.linspace(0, num_frames_in_file - 1, k)})


@contextmanager
def _open_video(path: str):
    """(container, video stream), closed afterwards; every FFmpeg error inside becomes a VideoError."""
    if not os.path.isfile(path):
        raise VideoError(path, "no such file")
    if os.path.getsize(path) == 0:
        raise VideoError(path, "file is empty (0 bytes)")
    try:
        # an absolute path, as FFmpeg takes "a:b.mp4" for a protocol; tags in odd encodings must not stop us
        with av.open(os.path.abspath(path), metadata_errors="ignore") as container:
            cover = av.stream.Disposition.attached_pic  # the cover of an audio file poses as a video stream
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise VideoError(path, "audio only" if container.streams.audio else "no video in it")
            codec = streams[0].codec_context
            if codec is None:
                raise VideoError(path, "this build of FFmpeg has no decoder for its codec")
            codec.thread_type = "NONE" if codec.width * codec.height <= SMALL_PIXELS else "AUTO"
            yield container, streams[0]
    except av.FFmpegError as error:
        raise VideoError(path, f"FFmpeg cannot read it as video ({error.strerror})") from error


def _packet_time(packet) -> int | None:
    return packet.dts if packet.pts is None else packet.pts  # None on the empty packet that ends the stream


def _start_and_duration(path: str, container, stream) -> tuple[int, int]:
    """Start and duration of the clip in ticks of stream.time_base."""
    start = stream.start_time or 0
    if stream.duration:
        return start, stream.duration
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", ""))  # Matroska: the end
    if tag:
        seconds = int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
        return start, round(seconds / stream.time_base) - start
    if container.duration:
        return start, round(container.duration / av.time_base / stream.time_base)
    # No duration anywhere (live recordings): read all packets, decode none, take the last time stamp.
    times = sorted(t for t in map(_packet_time, container.demux(stream)) if t is not None)
    if not times:
        raise VideoError(path, "no packet has a time stamp")
    container.seek(times[0], stream=stream)
    ticks = times[-1] - times[0]
    return times[0], ticks + ticks // max(len(times) - 1, 1)  # the last frame stays for the average time


def _to_square(frame, size: int, scaler: VideoReformatter, framing: str) -> np.ndarray:
    """(size, size, 3) uint8 RGB: shorter side to size (bicubic, in FFmpeg), centre crop, turned upright.

    framing crop | pad: the whole frame to RGB, then `resize_frames`. Pixels are taken as square: the
    sample aspect ratio is not applied. Mirrorings are not undone.
    """
    turns = round(frame.rotation / 90)  # both count counter-clockwise
    if framing != "ffmpeg":
        whole = np.rot90(scaler.reformat(frame, format="rgb24").to_ndarray(), turns).copy()
        whole = torch.from_numpy(whole).permute(2, 0, 1)
        return resize_frames(whole[None], size, framing)[0].permute(1, 2, 0).numpy()
    scale = size / min(frame.width, frame.height)
    width, height = round(frame.width * scale), round(frame.height * scale)
    # one thread: for pictures this small, starting more costs 10 times the work
    pixels = scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
    left, top = (width - size) // 2, (height - size) // 2
    square = pixels[top : top + size, left : left + size]
    return np.rot90(square, turns)


def _frames(container, stream, targets: list[int], chosen: list, skip: bool):
    """The frames that it takes to know what is on show at targets[len(chosen)], in order of presentation,
    while the caller appends to `chosen`; None where packets were left out before the next one.

    Packets wait undecoded until one lies beyond the target. A key frame that comes before it makes older ones
    useless: they are dropped. To a far target the file is sought. skip=False decodes everything instead.
    """
    waiting, dropped = [], False
    sought, position, may_seek = -1, 0, skip
    packets = container.demux(stream)
    while (packet := next(packets, None)) is not None:
        target, time = targets[len(chosen)], _packet_time(packet)
        if may_seek and time is not None:
            if sought < len(chosen) and (target - time) * stream.time_base > SEEK_SECONDS:
                sought, position = len(chosen), time
                container.seek(int(target - SEEK_MARGIN / stream.time_base), stream=stream)
                packets, waiting, dropped = container.demux(stream), [], True
                continue
            # A jump that led back: no key frame in between, or no index. From here on only read.
            may_seek = not (sought == len(chosen) and time <= position)
        if skip and waiting and packet.is_keyframe and time is not None and time <= target:
            waiting, dropped = [], True
        waiting.append(packet)
        if time is not None and time <= target:
            continue
        if dropped:
            stream.codec_context.flush_buffers()
            yield None
        for undecoded in waiting:
            yield from undecoded.decode()
        waiting, dropped = [], False


def _shown_at(path: str, container, stream, targets: list[int], square, skip: bool) -> list | None:
    """(pixels, pts) of the frame on show at each of the rising targets (ticks): the last with pts <= target.
    square: frame -> pixels.

    Returns None if a skip went wrong (it landed behind its target, or not on a key frame): call without skip.
    """
    ticks = 1 / stream.time_base  # a second
    chosen, shown, clean, skipped = [], None, True, False  # clean: no damage since the last key frame

    def choose(frame):  # scales at once, so that no large frame is kept
        again = chosen and chosen[-1][1] == frame.pts
        chosen.append(chosen[-1] if again else (square(frame), frame.pts))

    for frame in _frames(container, stream, targets, chosen, skip):
        if frame is None:
            shown, skipped = None, True
            continue
        if frame.pts is None:
            raise VideoError(path, "a frame has no time stamp")
        if skipped and shown is None and (frame.pts > targets[len(chosen)] or not frame.key_frame):
            return None
        while frame.pts > targets[len(chosen)]:
            if not clean:
                raise VideoError(path, f"damaged before {float(targets[len(chosen)] / ticks):.2f} s")
            choose(shown or frame)  # frame itself: the target lies before the first one
            if len(chosen) == len(targets):
                return chosen
        shown, clean = frame, (clean or frame.key_frame) and not frame.is_corrupt
    if shown is None and skipped:
        return None
    if shown is None or not clean:
        raise VideoError(path, "no frame can be decoded" if shown is None else "damaged at its end")
    missing = float((targets[-1] - shown.pts - (shown.duration or 0)) / ticks)
    if missing > LATE_SECONDS:
        raise VideoError(
            path, f"cut short: its pictures end {missing:.1f} s before the last moment asked for"
        )
    while len(chosen) < len(targets):
        choose(shown)
    return chosen


def read_frames(path: str, num_frames: int, size: int, framing: str = "ffmpeg", start=0.0, end=None):
    """The frames on show at the centres of num_frames equal parts of the video, from second `start` to `end`
    (None: to its end).

    Returns frames (K, 3, size, size) uint8 RGB and times (K,) float32, when those frames are presented, in s
    from the start of the file, whatever `start` is: gold spans count so, too. Where there are fewer frames
    than K they are repeated, times included. framing: ffmpeg scales and cuts as it decodes; crop and pad are
    CLIPImageProcessor's pixels of the whole frame.
    Raises VideoError if the file cannot be read, ends before `end`, or has damage on the way to a chosen
    frame.
    """
    assert num_frames >= 1 and size >= 1, f"need num_frames, size >= 1, got {num_frames}, {size}"
    assert 0 <= start < (math.inf if end is None else end), f"need 0 <= start < end, got {start}, {end}"
    path, chosen = os.fspath(path), None
    scaler = VideoReformatter()  # keeps its tables from frame to frame
    square = partial(_to_square, size=size, scaler=scaler, framing=framing)
    for skip in (True, False):
        if chosen is None:
            with _open_video(path) as (container, stream):
                first, duration = _start_and_duration(path, container, stream)
                tick, low, high = stream.time_base, round(start / stream.time_base), duration
                if end is not None:
                    high = min(round(end / tick), duration)
                if high < low or end is not None and end - duration * tick > LATE_SECONDS:
                    raise VideoError(path, _too_short(float(duration * tick), end or start))
                centres = [low + (2 * i + 1) * (high - low) // (2 * num_frames) for i in range(num_frames)]
                targets = [first + centre for centre in centres]
                chosen = _shown_at(path, container, stream, targets, square, skip)
                times = [float((pts - first) * tick) for _, pts in chosen or ()]
    frames = torch.from_numpy(np.stack([pixels for pixels, _ in chosen])).permute(0, 3, 1, 2)
    return frames.contiguous(), torch.tensor(times, dtype=torch.float32)  # (K, 3, size, size), (K,)


def _too_short(seconds: float, end: float) -> str:
    return f"it is {seconds:.1f} s long, but a part of it that is asked about ends at {end:.1f} s"


def check_video(path: str, needed: float = 0.0) -> dict:
    """Decode the whole file and say what is there; a bad file is reported, not raised. So is one that ends
    before second `needed`.

    Returns {"ok": bool, "reason": str, empty if ok, "frames": those that decode, "fps": average, "duration":
    seconds, "codec", "width", "height"}; None stands for what could not be established.
    """
    facts = dict.fromkeys(("frames", "fps", "duration", "codec", "width", "height"))
    path, faults = os.fspath(path), []
    try:
        with _open_video(path) as (container, stream):
            start, duration = _start_and_duration(path, container, stream)
            frames = damaged = refused = 0
            end, tick, codec = start, stream.time_base, stream.codec_context
            for packet in container.demux(stream):
                try:
                    decoded = packet.decode()
                except av.FFmpegError as error:
                    refused, cause, decoded = refused + 1, error.strerror, []
                for frame in decoded:
                    frames, damaged = frames + 1, damaged + frame.is_corrupt
                    end = max(end, (frame.pts or 0) + (frame.duration or 0))
            seconds, seen = float(duration * tick), float((end - start) * tick)
            fps = float(stream.average_rate or frames / max(seconds, 1e-3))
            facts = dict(frames=frames, fps=fps, duration=seconds, codec=codec.name)
            facts |= dict(width=codec.width, height=codec.height)
            if refused:
                faults.append(f"{refused} packets cannot be decoded ({cause})")
            if damaged:
                faults.append(f"{damaged} of {frames} decoded frames are damaged")
            if seconds - seen > LATE_SECONDS or not frames:
                faults.append(f"its pictures end at {seen:.1f} s of {seconds:.1f} s")
            if faults and stream.frames:  # not a fault by itself: edit lists leave frames out on purpose
                faults.append(f"{frames} of {stream.frames} frames decoded")
            if needed - seconds > LATE_SECONDS:
                faults.append(_too_short(seconds, needed))
    except VideoError as error:
        faults.append(error.cause)
    return {"ok": not faults, "reason": "; ".join(faults), **facts}


def resize_frames(frames: torch.Tensor, size: int, how: str) -> torch.Tensor:
    """uint8 (F_, 3, H, W) RGB -> uint8 (F_, 3, size, size), as CLIPImageProcessor does it.

    how: crop, the shorter side becomes `size` (bicubic, antialiased) and the middle is cut out; pad, first
    made square with CLIP's mean colour (LLaVA-1.5), so that nothing is lost.
    """
    H, W = frames.shape[-2:]
    if how == "pad":
        side = max(H, W)
        square = torch.tensor(CLIP_MEAN_COLOR, dtype=torch.uint8, device=frames.device)
        square = square.view(1, 3, 1, 1).repeat(len(frames), 1, side, side)
        top, left = (side - H) // 2, (side - W) // 2
        square[..., top : top + H, left : left + W] = frames
        frames, H, W = square, side, side
    short = min(H, W)
    shape = (int(size * H / short), int(size * W / short))
    # Pillow itself: its two passes round in fixed point, and torch's differ from them by up to 2 of 255.
    images = [Image.fromarray(x.permute(1, 2, 0).contiguous().cpu().numpy()) for x in frames]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    images = [
        image.resize(shape[::-1], Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        for image in images
    ]
    return torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in images]).to(frames.device)
