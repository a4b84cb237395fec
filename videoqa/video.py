"""Frames of a video file, chosen by presentation time, never by index: a variable frame rate or a wrong frame
count in the header cannot shift them. Nothing is substituted: a frame that cannot be decoded cleanly raises
VideoError.
"""

import io
import logging
import math
import os
import re
from bisect import bisect_right, insort
from collections import deque
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial

import av
import av.logging
import numpy as np
import torch
from av.format import Flags
from av.video.reformatter import VideoReformatter
from PIL import Image

from plumbing.options import BadInput, one_line

CLIP_MEAN_COLOR = (122, 116, 104)  # CLIP's mean of RGB, in 0..255: what LLaVA-1.5 pads with
SEEK_SECONDS = 10.0  # jump to a target farther away than this, else read on: most key frames come more often
SEEK_MARGIN = 1.0  # seconds; some containers index decoding times, which run ahead of presentation times
LATE_SECONDS = 1.0  # a video may end this much before it is said or asked to
LATE_SHARE = 0.05  # ... but not more than this share of its duration
CLOCK_SECONDS = 0.5  # a clock that goes back by more belongs to another recording
FRAMES_SHARE = 0.85  # of the packets give a frame at least; some hold none that is to be shown
HEADER_BYTES = 64  # what stands between two packets at most, in formats that are GAPLESS
TAIL_BYTES = 44  # what of a packet's frame, or of a mark of the end, follows the last packet at most
# What may follow a file's last packet in Matroska: its index, tags, attachments, chapters, table of contents
MATROSKA_ENDS = [bytes.fromhex(x) for x in ("1c53bb6b", "1254c367", "1941a469", "1043a770", "114d9b74")]
GAPLESS = {"matroska", "avi", "flv"}
REORDERED = 16  # packets at most by which decoding times may lag behind a jump of the pictures' times
TS_PACKETS = (188, 192, 204)  # bytes; a file of MPEG-TS is made of packets of one of these sizes
PLAYLISTS = {"concat", "hls", "dash", "sdp", "rtsp", "imf"}
MAX_PIXELS = 2**26  # of a picture: 8192 x 8192
MAX_RATE, MAX_SECONDS = 1000, 7 * 24 * 3600  # frames a second and seconds of a video
# What FFmpeg logs where no `Capture` takes it goes nowhere, unless the program that runs this wants it
logging.getLogger("libav").addHandler(logging.NullHandler())


class VideoError(BadInput):
    """A video that cannot be read as asked. path: the file; cause: one line."""

    def __init__(self, path: str, cause: str):
        super().__init__(path, cause)  # both, or the error could not be pickled back from a worker process
        self.path, self.cause = path, cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}; replace the file or drop its questions"


@contextmanager
def open_video(path: str):
    """A `_Source`, closed afterwards. Every FFmpeg error inside becomes a VideoError.

    One thread decodes: with several, whether a damaged picture is marked as such depends on which of them is
    first, and what they log is not this thread's. Several videos are read at once instead (data.load_clips).
    """
    if not os.path.isfile(path):
        raise VideoError(path, "no such file")
    if os.path.getsize(path) == 0:
        raise VideoError(path, "file is empty (0 bytes)")
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    limits = {"max_pixels": str(MAX_PIXELS), "protocol_whitelist": "file"}
    try:
        # an absolute path, as FFmpeg takes "a:b.mp4" for a protocol; tags in odd encodings must not stop us
        options = dict(options=limits, metadata_errors="ignore")
        with av.logging.Capture() as logs, av.open(os.path.abspath(path), **options) as container:
            if container.format.name in PLAYLISTS:
                raise VideoError(path, f"a list of other files ({container.format.name}), not a video")
            cover = av.stream.Disposition.attached_pic  # the cover of an audio file poses as a video stream
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise VideoError(path, "audio only" if container.streams.audio else "no video in it")
            best = container.streams.best("video")
            stream = best if best in streams else streams[0]
            codec = stream.codec_context
            if codec is None:
                raise VideoError(path, "this build of FFmpeg has no decoder for its codec")
            if codec.width * codec.height > MAX_PIXELS:
                raise VideoError(path, f"its pictures of {codec.width}x{codec.height} pixels are too large")
            for sound in container.streams.audio:
                _open_sound(path, sound.codec_context)
            codec.thread_type, codec.thread_count = "NONE", 1
            codec.options = {"err_detect": "explode", "max_pixels": limits["max_pixels"]}
            yield _Source(path, container, stream, logs)
    except av.FFmpegError as error:
        raise VideoError(path, f"FFmpeg cannot read it as video ({error.strerror})") from error


def _open_sound(path: str, codec) -> None:
    """Sound is not decoded; but a file that is damaged there is damaged."""
    try:
        if codec is not None:
            codec.open(strict=False)
    except av.FFmpegError as error:
        raise VideoError(path, f"damaged: its sound cannot be opened ({error.strerror})") from error


class _Source:
    """The packets of a video stream in the order of the file, with what the container says about it.

    Times are ticks of the stream's time base, `tick` (a Fraction) or `second` (a float) seconds each.
    zero, end: of the file. stated_end: of its pictures, None where the container does not say. step: what a
    picture lasts on average. outlasting: pictures begin after the stated end.
    While the packets are read: first and last time of a picture; seen_end and file_end, the latest end (s)
    of a picture and of a packet of any stream; times, sorted, those of the packets since the last seek; hole,
    whether bytes were skipped in front of the packet; holes, how often; sound_after, see `spoil`.
    """

    def __init__(self, path: str, container, stream, logs: list):
        self.path, self.container, self.stream, self.tick = path, container, stream, stream.time_base
        self.second, self.logs = float(self.tick), logs
        if reported := self.reported():
            raise VideoError(path, f"damaged: {one_line(reported[0])}")
        start, rate = stream.start_time or 0, stream.average_rate or stream.guessed_rate
        self.zero = start if container.start_time is None else self.ticks(container.start_time)
        if self.zero < 0:  # sound may run in before 0, pictures do not
            self.zero = min(start, 0)
        self.step = round(1 / rate / self.tick) if rate else 0
        formats = set(container.format.name.split(","))
        self.gapless = bool(GAPLESS & formats)  # packets follow each other without a byte in between
        # AVI holds no presentation times: its n-th picture is shown when its n-th packet is to be decoded
        self.by_order = "avi" in formats
        self.packet_bytes = TS_PACKETS if "mpegts" in formats else ()
        self.may_jump = bool(container.format.flags & Flags.ts_discont.value)  # its clock, as in MPEG-TS
        self.seconds = [float(s.time_base or 0) for s in container.streams]  # of a tick of each stream
        self.seen_end, self.file_end, self.holes = -math.inf, -math.inf, 0
        self.first, self.last = math.inf, -math.inf
        self.restart()
        tag = re.fullmatch(r"(\d{1,9}):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", ""))
        self.stated_end, self.outlasting = None, False
        if tag:  # Matroska's
            hours, minutes, seconds = map(float, tag.groups())
            self.stated_end = round((3600 * hours + 60 * minutes + seconds) / self.tick)
        elif stream.frames and stream.duration:  # FFmpeg guesses the stream's duration where nobody counted
            counted = stream.frames if self.by_order else 0  # AVI's; its index may be cut off
            self.stated_end = start + max(stream.duration, counted)
        self.end = self.stated_end or 0
        if container.duration:
            first = 0 if {"matroska", "flv"} & formats else self.zero  # where that duration begins
            self.end = max(self.end, first + self.ticks(container.duration))
        elif not self.end:  # no duration anywhere (live recordings): read all packets, decode none
            deque(self, maxlen=0)
            if not self.times:
                raise VideoError(path, "no packet has a time stamp")
            self.end = round(self.seen_end / self.tick)
            self.seek(self.zero)
            self.logs.clear()  # an end that was cut off is told by `fault`
        seconds = (self.end - self.zero) * self.second
        if not stream.frames / MAX_RATE <= seconds <= MAX_SECONDS:
            count = stream.frames or "its"
            raise VideoError(path, f"its clock is damaged: {count} frames in {seconds:.4g} s")

    def damage(self, target: int) -> VideoError:
        return VideoError(self.path, f"damaged before {(target - self.zero) * self.second:.2f} s")

    def goes_back(self, before: int, after: int) -> bool:
        """Whether these times of two frames are out of order. MPEG-PS states few; FFmpeg guesses the rest."""
        return after < before - 1.5 * self.step

    def decode(self, packet) -> list:
        """The packet's frames; `spoil` where it cannot be read or decoded without an error that is logged."""
        reported = self.reported()
        self.logs.clear()
        try:
            frames = packet.decode()
        except av.FFmpegError:
            frames = []
            self.spoil()
        if self.logs or reported:
            self.spoil()
        return frames

    def reported(self) -> list[str]:
        """The errors that the container's reader has logged; that a field stands there twice is none."""
        name = self.container.format.name
        return [words for _, who, words in self.logs if who == name and "Duplicate element" not in words]

    def spoil(self) -> None:
        """Something could not be decoded: no frame is sound until a key frame that has not been read yet."""
        self.sound_after = math.inf if self.by_order or not self.times else self.times[-1]

    def require(self, target: int, time: int) -> None:
        """Raises VideoError unless the frame of this time can be the one on show at the target: nothing on
        the way was damaged, and no later packet is due, so that none was lost in the decoder."""
        due = self.times[max(bisect_right(self.times, target) - 1, 0)] if self.times else time
        if self.sound_after is not None or abs(time - due) > 1.5 * self.step:
            raise self.damage(target)

    def ticks(self, microseconds: int) -> int:
        return round(Fraction(microseconds, av.time_base) / self.tick)

    def restart(self) -> None:
        self.packets = self.container.demux()
        self.times, self.position, self.clock = [], None, None
        self.hole, self.skipped, self.since, self.sound_after = False, 0, 0, None

    def seek(self, time: int) -> None:
        self.container.seek(time, stream=self.stream)
        self.restart()

    def __iter__(self):
        return self

    def __next__(self):
        """(packet, time); the time is None on the empty packet that ends the stream."""
        for packet in self.packets:
            ours = packet.stream is self.stream
            time = packet.dts if packet.pts is None or self.by_order else packet.pts
            if packet.pos is not None:
                if self.position is not None and packet.pos - self.position > max(self.skipped, HEADER_BYTES):
                    self.skipped, self.since = packet.pos - self.position, 0
                self.position = packet.pos + packet.size
            if time is None:
                if ours:
                    return packet, None
                continue
            before = self.file_end
            end = (time + (packet.duration or (self.step if ours else 0))) * self.seconds[packet.stream.index]
            self.file_end = max(self.file_end, end)
            if ours:
                self.seen_end = max(self.seen_end, end)
                self.first, self.last = min(self.first, time), max(self.last, time)
                if not packet.is_discard:
                    insort(self.times, time)
                self._check_clock(time if packet.dts is None else packet.dts, end - before)
                return packet, time
        raise StopIteration

    def _check_clock(self, clock: int, ahead: float) -> None:
        """clock: the packet's decoding time. ahead: the seconds by which it ends later than all before it."""
        jump = 0 if self.clock is None else (clock - self.clock) * self.second
        step = self.step * self.second
        frames = jump / step if step else 0
        # in AVI a picture that stays on show has an empty packet, of 8 bytes, for each frame that it stays
        self.hole = self.gapless and frames > 1.5 and self.skipped > HEADER_BYTES + 8 * frames
        self.holes += self.hole
        self.since += 1
        if self.hole or self.since > (0 if self.by_order else REORDERED):
            self.skipped = 0
        leaps = self.may_jump and min(jump, ahead - step) > max(CLOCK_SECONDS, 3 * step)
        if jump < -CLOCK_SECONDS or leaps:
            at = (clock - self.zero) * self.second - jump
            raise VideoError(self.path, f"its clock jumps by {jump:.1f} s at {at:.1f} s: several recordings")
        self.clock = clock

    def read_on(self) -> None:
        """Reads the packets that are left, so that seen_end and file_end are those of the whole file."""
        with suppress(av.FFmpegError):  # `fault` says whether what cannot be read is too much
            deque(self, maxlen=0)

    def outlasted(self) -> bool:
        """Whether pictures begin after the stated end, once all packets are read. If so the end is put behind
        them: FFmpeg itself writes such mp4 files where B-frames meet a variable frame rate."""
        if (self.last - self.end) * self.second > self.tolerance():
            if self.first > self.end or self.last - self.zero > 2 * (self.end - self.zero):
                raise VideoError(self.path, "its clock is damaged: pictures begin long after its end")
            self.end, self.outlasting = self.last + self.step, True
            return True
        return False

    def tolerance(self) -> float:
        """How many seconds the end may differ from the stated one."""
        duration = (self.end - self.zero) * self.second
        return min(LATE_SECONDS, max(LATE_SHARE * duration, 0.5 * self.step * self.second))

    def fault(self) -> str:
        """What is missing of what the container states, once all packets are read. Empty: nothing."""
        zero, end = self.zero * self.second, self.end * self.second
        lost = end - self.file_end
        if self.stated_end is not None:
            lost = max(lost, self.stated_end * self.second - self.seen_end)
        size = os.path.getsize(self.path)
        if self.gapless and not self.by_order and self.position is not None:
            with open(self.path, "rb") as file:
                file.seek(self.position)
                rest = file.read(HEADER_BYTES + 1)
            if len(rest) > TAIL_BYTES and not any(mark in rest for mark in MATROSKA_ENDS):
                return f"damaged or cut short: its last {size - self.position} bytes cannot be read"
        if self.packet_bytes and all(size % n for n in self.packet_bytes):
            return "cut short: it ends in the middle of a packet"
        index = len(self.stream.index_entries)
        if self.outlasting and index < FRAMES_SHARE * self.stream.frames:
            return f"its index is damaged: it holds {index} of {self.stream.frames} pictures"
        if lost > self.tolerance():
            seen = max(self.seen_end - zero, 0)
            return f"cut short: its pictures end at {seen:.1f} s of {end - zero:.1f} s"
        return ""


def _to_square(frame, size: int, scaler: VideoReformatter, framing: str) -> np.ndarray:
    """(size, size, 3) uint8 RGB: shorter side to size (bicubic, in FFmpeg), centre crop, turned upright.

    framing crop | pad: the whole frame to RGB, then `resize_frame`. Pixels are taken as square: the sample
    aspect ratio is not applied. Mirrorings are not undone.
    """
    turns = round(frame.rotation / 90)  # both count counter-clockwise
    if framing != "ffmpeg":
        whole = scaler.reformat(frame, format="rgb24").to_ndarray()
        return resize_frame(np.rot90(whole, turns), size, framing)
    scale = size / min(frame.width, frame.height)
    width, height = round(frame.width * scale), round(frame.height * scale)
    # one thread: for pictures this small, starting more costs 10 times the work
    pixels = scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
    left, top = (width - size) // 2, (height - size) // 2
    return np.rot90(pixels[top : top + size, left : left + size], turns)


def resize_frame(pixels: np.ndarray, size: int, framing: str) -> np.ndarray:
    """uint8 (H, W, 3) RGB -> uint8 (size, size, 3), as CLIPImageProcessor does it.

    framing: crop, the shorter side becomes `size` (bicubic, antialiased) and the middle is cut out; pad,
    first made square with CLIP's mean colour (LLaVA-1.5), so that nothing is lost.
    """
    image = Image.fromarray(pixels)
    if framing == "pad":
        whole, side = image, max(image.size)
        image = Image.new("RGB", (side, side), CLIP_MEAN_COLOR)
        image.paste(whole, ((side - whole.width) // 2, (side - whole.height) // 2))
    # Pillow itself: its two passes round in fixed point, and torch's differ from them by up to 2 of 255.
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image.crop((left, top, left + size, top + size)))


def _frames(source: _Source, targets: list[int], chosen: list, skip: bool):
    """(frame, time) of those frames that it takes to know what is on show at targets[len(chosen)], in order
    of presentation, while the caller appends to `chosen`; (None, None) where packets were left out before
    the next one.

    Packets wait undecoded until one lies beyond the target. A key frame that comes before it makes older ones
    useless: they are dropped. To a far target the file is sought. skip=False decodes everything instead.
    """
    codec = source.stream.codec_context
    waiting, dropped, hole, clock = [], False, False, deque()
    sought, position, may_seek = -1, 0, skip and not source.may_jump
    settled, behind = 0, -1
    for packet, time in source:
        target = targets[min(len(chosen), len(targets) - 1)]
        if settled < len(chosen):  # what a chosen frame was made from may be shown, and be damaged, after it
            settled, behind = len(chosen), codec.reorder_depth
        behind -= 1
        if may_seek and time is not None and behind < 0:
            if sought < len(chosen) and (target - time) * source.second > SEEK_SECONDS:
                sought, position = len(chosen), time
                source.seek(int(target - SEEK_MARGIN / source.tick))
                waiting, dropped, hole = [], True, False
                continue
            # A jump that led back: no key frame in between, or no index. From here on only read.
            may_seek = not (sought == len(chosen) and time <= position)
        starts = packet.is_keyframe and time is not None and time <= target
        hole = (hole or source.hole) and not starts or packet.is_corrupt
        if skip and waiting and starts:
            waiting, dropped = [], True
        waiting.append(packet)
        if time is not None and time <= target and behind < 0:
            continue
        if hole or skip and source.by_order and codec.has_b_frames:
            raise source.damage(target)
        if dropped:
            codec.flush_buffers()
            clock.clear()
            yield None, None
        for undecoded in waiting:
            clock.append(undecoded.dts)
            for frame in source.decode(undecoded):
                yield frame, clock.popleft() if source.by_order else frame.pts
        waiting, dropped = [], False


def _shown_at(source: _Source, targets: list[int], square, skip: bool) -> list:
    """(pixels, time) of the frame on show at each of the rising targets (ticks): the last whose time is at
    most the target. square: frame -> pixels.

    Raises VideoError. With skip it may be one that decoding from a key frame caused: then call without skip.
    """
    chosen, shown, shown_time, skipped = [], None, None, False
    reorder = source.stream.codec_context.reorder_depth  # so many frames later a reference is shown at most
    behind = reorder  # frames since the last choice

    def choose(frame, time):  # scales at once, so that no large frame is kept
        source.require(targets[len(chosen)], time)
        again = chosen and chosen[-1][1] == time
        chosen.append(chosen[-1] if again else (square(frame), time))

    for frame, time in _frames(source, targets, chosen, skip):
        if frame is not None and time is None:
            raise VideoError(source.path, "a frame has no time stamp")
        if frame is not None and (
            frame.is_corrupt or shown is not None and source.goes_back(shown_time, time)
        ):
            source.spoil()
        if behind < reorder and source.sound_after is not None:
            raise source.damage(targets[len(chosen) - 1])
        if frame is None:
            shown, skipped, source.sound_after = None, True, None
            continue
        behind += 1
        if len(chosen) < len(targets):
            if skipped and shown is None and (time > targets[len(chosen)] or not frame.key_frame):
                raise source.damage(targets[len(chosen)])
            before = (frame, time) if shown is None else (shown, shown_time)  # the first, for an early target
            while len(chosen) < len(targets) and time > targets[len(chosen)]:
                choose(*before)
                behind = 1
        if len(chosen) == len(targets) and behind >= reorder:
            return chosen
        if source.sound_after is not None and frame.key_frame and time > source.sound_after:
            source.sound_after = None
        shown, shown_time = frame, time
    if shown is None:
        raise VideoError(source.path, "no frame can be decoded: damaged, or larger than 8192x8192 pixels")
    if len(chosen) < len(targets) and (fault := source.fault()):
        raise VideoError(source.path, fault)
    if behind < reorder and source.sound_after is not None:
        raise source.damage(targets[len(chosen) - 1])
    while len(chosen) < len(targets):
        choose(shown, shown_time)
    return chosen


def read_frames(path: str, num_frames: int, size: int, framing: str = "ffmpeg", start=0.0, end=None):
    """The frames on show at the centres of num_frames equal parts of the video, from second `start` to `end`
    (None: to its end).

    Returns frames (K, 3, size, size) uint8 RGB and times (K,) float32, when those frames are presented, in s
    from the start of the file, whatever `start` is: gold spans count so, too. Where there are fewer frames
    than K they are repeated, times included. framing: ffmpeg scales and cuts as it decodes; crop and pad are
    CLIPImageProcessor's pixels of the whole frame.
    Raises VideoError if the file cannot be read, ends before `end`, is not as long as it says, or has damage
    on the way to a chosen frame.
    """
    assert num_frames >= 1 and size >= 1, f"need num_frames, size >= 1, got {num_frames}, {size}"
    assert 0 <= start < (math.inf if end is None else end), f"need 0 <= start < end, got {start}, {end}"
    path, square = os.fspath(path), partial(_to_square, size=size, framing=framing)
    try:
        frames, times = _read_once(path, num_frames, square, start, end, skip=True)
    except VideoError:  # perhaps only because decoding began at a key frame that can not be begun with
        frames, times = _read_once(path, num_frames, square, start, end, skip=False)
    frames = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return frames.contiguous(), torch.tensor(times, dtype=torch.float32)  # (K, 3, size, size), (K,)


def _read_once(path, num_frames, square, start, end, skip: bool, file_end: int | None = None):
    """The pixels and the times (s) of read_frames, as two lists. file_end: the end of the file, if known."""
    with open_video(path) as source:
        if file_end is not None:
            source.end, source.outlasting = file_end, True
        duration = source.end - source.zero
        low, high = round(start / source.tick), duration
        if end is not None:
            high = min(round(end / source.tick), duration)
        if high < low or end is not None and end - duration * source.tick > LATE_SECONDS:
            raise VideoError(path, too_short(float(duration * source.tick), end or start))
        centres = [low + (2 * i + 1) * (high - low) // (2 * num_frames) for i in range(num_frames)]
        square = partial(square, scaler=VideoReformatter())  # keeps its tables from frame to frame
        chosen = _shown_at(source, [source.zero + centre for centre in centres], square, skip)
        if end is None or source.may_jump:
            source.read_on()
            if not source.outlasting and source.outlasted():
                return _read_once(path, num_frames, square, start, end, skip, source.end)
            if fault := source.fault():
                raise VideoError(path, fault)
        return [pixels for pixels, _ in chosen], [float((t - source.zero) * source.tick) for _, t in chosen]


def frame_strip(path: str, start=0.0, end=None) -> bytes:
    """Six frames of the video side by side, 96 pixels each, as a JPEG."""
    frames, _ = read_frames(path, 6, 96, start=start, end=end)
    content = io.BytesIO()
    picture = Image.fromarray(np.concatenate(frames.permute(0, 2, 3, 1).numpy(), axis=1))
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()


def too_short(seconds: float, end: float) -> str:
    return f"it is {seconds:.1f} s long, but a part of it that is asked about ends at {end:.1f} s"
