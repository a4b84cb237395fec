"""Video frames, questions, tokens and batches: everything between files on disk and tensors.

Frames are chosen by presentation time, never by index, so a variable frame rate or a wrong frame count in the
header cannot shift them. Nothing is substituted: a frame that cannot be decoded cleanly raises VideoError.

    python data.py check FILE.jsonl --videos DIR    # every clip: ok or reason, frames, fps, duration, codec
    python data.py convert NAME ANNOTATIONS .. --videos DIR --out FILE.jsonl    # public data sets: convert.py
"""

import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

from answers import Question, instruction, prompt_text
from cli import ArgumentParser, BadInput, run_script, write_json
from clip import resize_frames
from convert import NAMES, convert

PAD_ID, BOS_ID, EOS_ID, VIDEO_ID = 0, 1, 2, 3  # VIDEO_ID: placeholder for one visual token, never sampled
FIRST_BYTE = 4  # ids 4..259 are the bytes, then come the words
SEEK_SECONDS = 10.0  # jump to a target farther away than this, else read on: most key frames come more often
SEEK_MARGIN = 1.0  # seconds; some containers index decoding times, which run ahead of presentation times
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


# ---- video ----


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

    framing crop | pad: the whole frame to RGB, then `clip.resize_frames`. Pixels are taken as square: the
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


def _shown_at(path: str, container, stream, targets: list[int], square, skip: bool) -> list | None:
    """(pixels, pts) of the frame on show at each of the rising targets (ticks): the last with pts <= target.
    square: frame -> pixels.

    Packets wait undecoded until one lies beyond the target. A key frame that comes before it makes older ones
    useless: they are dropped. To a far target the file is sought. skip=False decodes everything instead.
    Returns None if a skip went wrong (it landed behind its target, or not on a key frame): call without skip.
    """
    ticks = 1 / stream.time_base  # a second
    chosen, waiting, shown, clean = [], [], None, True  # clean: no damage since the last key frame
    dropped = skipped = False  # packets were left out: the decoder does not know yet / it knows
    sought, position, may_seek = -1, 0, skip

    def choose(frame):  # scales at once, so that no large frame is kept
        again = chosen and chosen[-1][1] == frame.pts
        chosen.append(chosen[-1] if again else (square(frame), frame.pts))

    while True:
        for packet in container.demux(stream):
            target, time = targets[len(chosen)], _packet_time(packet)
            if may_seek and time is not None:
                if sought < len(chosen) and target - time > SEEK_SECONDS * ticks:
                    break
                # A jump that led back: no key frame in between, or no index. From here on only read.
                may_seek = not (sought == len(chosen) and time <= position)
            if skip and waiting and packet.is_keyframe and time is not None and time <= target:
                waiting, dropped = [], True
            waiting.append(packet)
            if time is not None and time <= target:
                continue
            if dropped:
                stream.codec_context.flush_buffers()
                dropped, skipped, shown = False, True, None
            for frame in (f for p in waiting for f in p.decode()):
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
            waiting = []
        else:
            break
        sought, position = len(chosen), time
        container.seek(int(target - SEEK_MARGIN * ticks), stream=stream)
        waiting, dropped = [], True
    if shown is None and skipped:
        return None
    if shown is None or not clean:
        raise VideoError(path, "no frame can be decoded" if shown is None else "damaged at its end")
    missing = float((targets[-1] - shown.pts - (shown.duration or 0)) / ticks)
    if missing > 1.0:
        raise VideoError(
            path, f"cut short: its pictures end {missing:.1f} s before the last moment asked for"
        )
    while len(chosen) < len(targets):
        choose(shown)
    return chosen


def read_frames(path: str, num_frames: int, size: int, framing: str = "ffmpeg"):
    """The frames on show at the centres of num_frames equal parts of the clip.

    Returns frames (K, 3, size, size) uint8 RGB and times (K,) float32, when those frames are presented, in s
    from the start of the clip. A clip with fewer frames than K repeats them, times included. framing: ffmpeg
    scales and cuts as it decodes; crop and pad are CLIPImageProcessor's pixels of the whole frame.
    Raises VideoError if the file cannot be read or anything on the way to a chosen frame is damaged.
    """
    assert num_frames >= 1 and size >= 1, f"need num_frames, size >= 1, got {num_frames}, {size}"
    path, chosen = os.fspath(path), None
    scaler = VideoReformatter()  # keeps its tables from frame to frame
    square = partial(_to_square, size=size, scaler=scaler, framing=framing)
    for skip in (True, False):
        if chosen is None:
            with _open_video(path) as (container, stream):
                start, duration = _start_and_duration(path, container, stream)
                targets = [start + (2 * i + 1) * duration // (2 * num_frames) for i in range(num_frames)]
                chosen = _shown_at(path, container, stream, targets, square, skip)
                times = [float((pts - start) * stream.time_base) for _, pts in chosen or ()]
    frames = torch.from_numpy(np.stack([pixels for pixels, _ in chosen])).permute(0, 3, 1, 2)
    return frames.contiguous(), torch.tensor(times, dtype=torch.float32)  # (K, 3, size, size), (K,)


def check_video(path: str) -> dict:
    """Decode the whole file and say what is there; a bad file is reported, not raised.

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
            if seconds - seen > 1.0 or not frames:
                faults.append(f"its pictures end at {seen:.1f} s of {seconds:.1f} s")
            if faults and stream.frames:  # not a fault by itself: edit lists leave frames out on purpose
                faults.append(f"{frames} of {stream.frames} frames decoded")
    except VideoError as error:
        faults.append(error.cause)
    return {"ok": not faults, "reason": "; ".join(faults), **facts}


# ---- questions ----


def _is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # bool is no number here


def _is_span(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _read_question(line: bytes, videos_dir: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:  # bad UTF-8 is a ValueError as well
        raise DataError(f"{where}: not JSON ({error}); write one JSON object a line, in UTF-8") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object; write one object {{...}} a line")

    def need(good: bool, field: str, remedy: str):
        if not good:
            what = f"is {json.dumps(row[field])[:60]}" if field in row else "is missing"
            raise DataError(f"{where}: field '{field}' {what}; {remedy}")

    for field in ("id", "video", "question", "answer"):
        need(_is_text(row.get(field)), field, "give a text that is not empty")
    need(isinstance(row.get("category", ""), str), "category", "give a text or leave it out")
    options, index, duration = row.get("options"), row.get("answer_index"), row.get("duration")
    if options is not None or index is not None:
        good = isinstance(options, list) and len(options) >= 2 and all(map(_is_text, options))
        need(good, "options", "give a list of at least two texts beside 'answer_index'")
        good = type(index) is int and 0 <= index < len(options)
        need(good, "answer_index", f"give the right option as a whole number from 0 to {len(options) - 1}")
    field = "span" if row.get("span") is not None else "spans"
    need(field == "spans" or row.get("spans") is None, "spans", "give 'span' or 'spans', not both")
    spans = [row["span"]] if field == "span" else row.get("spans")
    good = spans is None or isinstance(spans, list) and spans != [] and all(map(_is_span, spans))
    need(good, field, "give [start, end], two numbers in seconds; for 'spans' a list of such pairs")
    good = all(0 <= start < end for start, end in spans or ())
    need(good, field, "the start must be before the end, neither negative nor after the end")
    good = duration is None or _is_number(duration) and duration > 0
    need(good, "duration", "give seconds > 0 or leave it out")
    good = all(duration is None or end <= duration for _, end in spans or ())
    need(good, field, f"it ends after the video, whose 'duration' is {duration} s; correct one of them")
    need(isinstance(row.get("duration_class", ""), str), "duration_class", "give a text or leave it out")
    video, spans = os.path.join(videos_dir, row["video"]), tuple(map(tuple, spans or ()))
    rest = (
        row.get("category", ""),
        tuple(options or ()),
        index,
        spans,
        duration,
        row.get("duration_class", ""),
    )
    return Question(row["id"], video, row["question"], row["answer"], *rest)


def load_questions(jsonl_path: str, videos_dir: str) -> list[Question]:
    """The questions of a JSONL file, video paths joined to videos_dir; opens no video.

    Blank lines, unknown fields and selection.py's report in line 1 are passed over.
    Raises DataError at the first bad line.
    """
    if not os.path.isfile(jsonl_path):
        raise DataError(f"{jsonl_path}: no such file; give a JSONL file of questions")
    questions, line_of = [], {}
    with open(jsonl_path, "rb") as file:  # bytes, so that bad UTF-8 is reported with its line
        for number, line in enumerate(file, start=1):
            if line.strip() and not (number == 1 and line.startswith(b'{"selection"')):  # its report
                where = f"{jsonl_path}, line {number}"
                question = _read_question(line, videos_dir, where)
                first = line_of.setdefault(question.id, number)
                if first != number:
                    raise DataError(f"{where}: field 'id' repeats that of line {first}; make ids unique")
                questions.append(question)
    if not questions:
        raise DataError(f"{jsonl_path}: holds no question; write one JSON object a line")
    return questions


# ---- tokens ----


class Tokenizer:
    """Whole words where the vocabulary has them, UTF-8 bytes elsewhere: decode(encode(text)) == text for all.

    ids: 0..3 special, 4..259 the bytes, from 260 the words. A word stands for itself with a space before it;
    the text gets a space in front for its first word's sake, which decode takes off again.
    """

    pieces = re.compile(r" ?\d+\.\d+| ?\w+| ?[^\w\s]|\s")  # every character falls in exactly one piece

    def __init__(self, words: list[str]):
        assert len(set(words)) == len(words) and all(words), "words must be distinct and not empty"
        self.words = list(words)
        self.id_of = {f" {word}": FIRST_BYTE + 256 + i for i, word in enumerate(self.words)}
        singles = [bytes([i]) for i in range(256)]
        self.bytes_of = [b""] * FIRST_BYTE + singles + [piece.encode() for piece in self.id_of]

    @property
    def vocab_size(self) -> int:
        return len(self.bytes_of)

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS and EOS; never a special id, whatever the text says."""
        ids = []
        for piece in self.pieces.findall(f" {text}"):
            word = self.id_of.get(piece)
            ids += [FIRST_BYTE + byte for byte in piece.encode()] if word is None else [word]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text; special ids are skipped, bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return b"".join(self.bytes_of[i] for i in ids).decode(errors="replace").removeprefix(" ")

    def banned_ids(self, V: int) -> torch.Tensor:
        """(V,) bool: ids that a policy must never produce: padding, start,
        visual placeholder, unused rows."""
        ids = torch.arange(V)
        return (ids == PAD_ID) | (ids == BOS_ID) | (ids == VIDEO_ID) | (ids >= self.vocab_size)

    end_ids = (EOS_ID,)

    def prompt(self, text: str, num_video_tokens: int) -> list[int]:
        return [BOS_ID] + [VIDEO_ID] * num_video_tokens + self.encode(text)

    def save(self, path: str) -> None:
        write_json(path, {"type": "words+bytes", "words": self.words})

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """Raises DataError if the file is not one that save() wrote."""
        try:
            with open(path, encoding="utf-8") as file:
                saved = json.load(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}; give a file written by Tokenizer.save") from error
        if not isinstance(saved, dict) or saved.get("type") != "words+bytes":
            raise DataError(f"{path}: field 'type' is not words+bytes; give a file written by Tokenizer.save")
        return cls(saved["words"])


# What stands before the video and between video and question, and after the question. The systems' texts are
# those their models were tuned with (LLaVA-1.5, LLaMA-2-chat, ChatML).
TEMPLATES = {
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
        " detailed, and polite answers to the user's questions. USER: ",
        "\n",
        " ASSISTANT:",
    ),
    "llama-2": (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the"
        " visual content that the user provides, and assist the user with a variety of tasks using natural"
        " language."
        "\n<</SYS>>\n\n",
        "\n",
        " [/INST]",
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "plain": ("", "\n", "\n"),
}
END_TOKENS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


class ChatTokenizer:
    """A pretrained decoder's tokenizer.json, by the `tokenizers` package, with a conversation template.

    placeholder_id: config.json's image_token_index, which stands for one video token. Where tokenizer.json
    knows that id its text is part of what is tokenised, so the result is AutoTokenizer's; where it does not,
    what stands before and after the video is tokenised apart, as LLaVA's own code does.
    think: whether the answer format that `build_prompt` tells the model has a think part.
    """

    def __init__(self, folder: str, template: str, placeholder_id: int, V: int, think: bool = False):
        path = os.path.join(folder, "tokenizer.json")
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"{path}: needs the package tokenizers: pip install tokenizers") from error
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file; copy the checkpoint's tokenizer.json there")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the package raises no class of its own
            raise DataError(f"{path}: {str(error).splitlines()[0]}; copy the file again") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if max(self.vocab_size - 1, placeholder_id) >= V:
            highest = max(self.vocab_size - 1, placeholder_id)
            raise DataError(f"{path}: id {highest} exceeds the embedding's {V} rows; use files of one model")
        special = {i: t.content for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self.end_ids = tuple(i for i, text in special.items() if text in END_TOKENS)
        if not self.end_ids:
            raise DataError(f"{path}: no end token; it needs one of {', '.join(END_TOKENS)}")
        self.special_texts = set(special.values()) | {self.tokenizer.id_to_token(placeholder_id) or "<image>"}
        self.banned = (set(special) | {placeholder_id}) - set(self.end_ids)
        self.before, self.between, self.after = TEMPLATES[template]
        self.placeholder_id, self.think = placeholder_id, think
        self.video_start = self.prompt("", 1).index(placeholder_id)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def banned_ids(self, V: int) -> torch.Tensor:
        """(V,) bool: never to be produced: special ids but the ends, the placeholder, unused rows."""
        ids = torch.arange(V)
        return torch.isin(ids, torch.tensor(sorted(self.banned))) | (ids >= self.vocab_size)

    def prompt(self, text: str, num_video_tokens: int) -> list[int]:
        """Ids of the conversation, the placeholder repeated. DataError: text holds a special token."""
        odd = next((token for token in sorted(self.special_texts) if token in text), None)
        if odd is not None:
            raise DataError(f"question {json.dumps(text[:60])}: holds the special token {odd}; take it out")
        video = [self.placeholder_id] * num_video_tokens
        name, after = self.tokenizer.id_to_token(self.placeholder_id), self.between + text + self.after
        if name is None:
            return self.tokenizer.encode(self.before).ids + video + self.encode(after)
        ids = self.tokenizer.encode(self.before + name + after).ids
        place = ids.index(self.placeholder_id)
        return ids[:place] + video + ids[place + 1 :]


# ---- batches ----


def build_prompt(tokenizer, question: Question, num_video_tokens: int, times: list[float]) -> list[int]:
    """Token ids: opening, the placeholders of the video, the question, and for a chat model the answer format
    and the frames' times (seconds). The answer follows at once."""
    text = prompt_text(question)
    if isinstance(tokenizer, ChatTokenizer):
        text += "\n" + instruction(question, tokenizer.think, times)
    return tokenizer.prompt(text, num_video_tokens)


def _pad(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    assert rows, "nothing to collate"
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD_ID), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(len(row))
        ids[i, part], mask[i, part] = torch.tensor(row, dtype=torch.int64), True
    return ids, mask


def collate_prompts(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """prompt_ids (P, S) int64, prompt_mask (P, S) bool, padded on the left; nothing is ever cut off."""
    return _pad(prompts, left=True)


def collate_completions(completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """completion_ids (B, T) int64, completion_mask (B, T) bool, padded on the right; the end token counts."""
    return _pad(completions, left=False)


@dataclass
class Prompts:
    """P prompts, ready for the decoder; rows can be taken out like those of a tensor."""

    prompt_ids: torch.Tensor  # (P, S) int64, padded on the left
    prompt_mask: torch.Tensor  # (P, S) bool
    video_embeds: torch.Tensor  # (P, N_video, D) float32

    def __getitem__(self, rows):
        return Prompts(self.prompt_ids[rows], self.prompt_mask[rows], self.video_embeds[rows])


def load_clips(paths: list[str], num_frames: int, size: int, framing: str = "ffmpeg"):
    """Frames (C, K, 3, size, size) uint8 and times (C, K) seconds of C videos; the first
    bad one raises VideoError."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads: FFmpeg decodes outside Python's lock
        clips = list(pool.map(lambda path: read_frames(path, num_frames, size, framing), paths))
    return torch.stack([frames for frames, _ in clips]), torch.stack([times for _, times in clips])


class PromptSet:
    """Questions with their videos embedded: each video is decoded and sent through the
    frozen CLIP and adapter once.

    model: a VideoLM (embed_video, cfg, clip_cfg). Holds (number of videos, N_video, D) on the model's device.
    """

    def __init__(self, model, tokenizer: Tokenizer, questions: list[Question]):
        self.questions, self.tokenizer = questions, tokenizer
        videos = sorted({question.video for question in questions})
        embeds, times, patches = [], [], (model.clip_cfg.image_size // model.clip_cfg.patch_size) ** 2
        # 2**15 patch tokens are 0.5 GB at width 4096: one clip of 50 frames of CLIP ViT-L/14-336
        chunk = max(1, min(64, 2**15 // (model.cfg.num_frames * patches)))
        for start in tqdm(range(0, len(videos), chunk), "videos", leave=False):
            paths = videos[start : start + chunk]
            sizes = model.cfg.num_frames, model.clip_cfg.image_size, model.cfg.framing
            frames, seconds = load_clips(paths, *sizes)
            embeds.append(model.embed_video(frames, seconds))
            times += seconds.tolist()
        self.video_embeds = torch.cat(embeds)
        place = {video: i for i, video in enumerate(videos)}
        self.video_of = torch.tensor([place[question.video] for question in questions])
        num_tokens = self.video_embeds.shape[1]
        self.prompts = [build_prompt(tokenizer, q, num_tokens, times[place[q.video]]) for q in questions]

    def __len__(self) -> int:
        return len(self.questions)

    def texts(self, rollout) -> list[str]:
        """The answers in a batch of completions, special ids left out."""
        rows = zip(rollout.completion_ids.tolist(), rollout.completion_mask.sum(dim=1).tolist(), strict=True)
        return [self.tokenizer.decode(ids[:length]) for ids, length in rows]

    def __getitem__(self, rows: torch.Tensor) -> Prompts:
        """The prompts of these question numbers, int64 (P,)."""
        device = self.video_embeds.device
        prompt_ids, prompt_mask = collate_prompts([self.prompts[i] for i in rows.tolist()])
        embeds = self.video_embeds[self.video_of[rows].to(device)]
        return Prompts(prompt_ids.to(device), prompt_mask.to(device), embeds)


# ---- commands ----


def check(jsonl_path: str, videos_dir: str) -> bool:
    """Print a line for every distinct video and a summary; True if all are sound."""
    videos = list(dict.fromkeys(question.video for question in load_questions(jsonl_path, videos_dir)))
    num_ok = 0
    for video in videos:
        facts = check_video(video)
        num_ok += facts["ok"]
        parts = ["ok  " if facts["ok"] else "FAIL", video, facts["reason"]]
        if facts["codec"]:
            about = "{frames} frames, {fps:.3f} fps, {duration:.2f} s, {codec} {width}x{height}"
            parts.append(about.format_map(facts))
        print("  ".join(filter(None, parts)), flush=True)
    print(f"{len(videos)} videos: {num_ok} ok, {len(videos) - num_ok} failed")
    return num_ok == len(videos)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="decode every video once and report each")
    checker.add_argument("file", help="questions, one JSON object a line")
    checker.add_argument("--videos", required=True, help="the folder that video paths are relative to")
    converter = commands.add_parser("convert", help="a public data set's own files to questions")
    converter.add_argument("name", help=", ".join(NAMES))
    converter.add_argument("annotations", nargs="+", help="its files, or the folder that holds them")
    converter.add_argument("--videos", required=True, help="the folder that is searched for its videos")
    converter.add_argument("--out", required=True, help="the JSONL file to write")
    converter.add_argument("--bad_spans", default="error", choices=("error", "drop", "clip"))
    args = parser.parse_args()
    if args.command == "convert":
        print(convert(args.name, args.annotations, args.videos, args.out, args.bad_spans))
        return 0
    return 0 if check(args.file, args.videos) else 2


if __name__ == "__main__":
    run_script(main)
