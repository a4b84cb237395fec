"""Questions, prompts and batches: everything between files on disk and tensors. Rows are read by
videoqa/questions.py, videos by videoqa/video.py.

python data.py check FILE.jsonl --videos DIR    # every clip: ok or reason, frames, fps, duration, codec
python data.py convert NAME ANNOTATIONS .. --videos DIR --out FILE.jsonl    # public data sets
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from plumbing.machine import say, show_progress
from plumbing.options import ArgumentParser, BadInput, Count, Options, PositiveShare, run_script
from videoqa.answers import Question, instruction, prompt_text
from videoqa.video import read_frames

PAD_ID, BOS_ID, EOS_ID, VIDEO_ID = 0, 1, 2, 3  # VIDEO_ID: placeholder for one visual token, never sampled
# The longest vector of a processor's sums: so a prompt's sums are taken in the same order in every batch. In
# products of 16 bits another order moved log-probabilities of an update from those sampled by up to 0.14
PROMPT_BLOCK = 16


# ---- the sets of a run ----


@dataclass
class DataOptions(Options):
    """The data: real videos, or the embedded world where --data is empty"""

    data: str = ""  # JSONL of questions; empty: the embedded world
    videos: str = ""  # folder that the JSONL's video paths are relative to
    eval_data: str = ""  # JSONL of held-out questions; empty: of a share of --data's videos
    eval_videos: str = ""  # folder of its videos; empty: --videos
    eval_share: PositiveShare = 0.25  # --data: share of the videos held out
    world: Literal["default", "hard"] = "default"  # hard: longer clips, more things, order and duration
    world_dir: str = "world/rl"  # folder of the embedded world's drawn clips
    num_train_clips: Count = 500  # embedded world: clips to learn from
    num_eval_clips: Count = 250  # embedded world: held-out clips

    def __post_init__(self):
        super().__post_init__()
        if self.eval_data and not self.data:
            raise BadInput("--eval_data holds out questions of --data; give both, or neither")
        if self.eval_videos and not self.eval_data:
            raise BadInput(f"--eval_videos {self.eval_videos}: needs --eval_data; give it, or leave it out")
        if self.data and self.world != "default":
            raise BadInput(f"--world {self.world}: --data takes its place; leave one of them out")
        if bool(self.data) != bool(self.videos):
            wanted = "a JSONL file and the folder its paths are relative to"
            raise BadInput(f"--data and --videos go together: {wanted}; give both")


def world_folders(options: DataOptions) -> dict[str, tuple[str, range]]:
    """Folder and scene seeds of the embedded world's two sets; pretrain.py draws from seed 0 on."""
    sets = {"train": (1_000_000, options.num_train_clips), "eval": (2_000_000, options.num_eval_clips)}
    name = "hard_" if options.world == "hard" else ""
    folder_of = {k: os.path.join(options.world_dir, f"{name}{k}{n}") for k, (_, n) in sets.items()}
    return {k: (folder_of[k], range(first, first + n)) for k, (first, n) in sets.items()}


def draw_world(options: DataOptions) -> None:
    """Draws the embedded world's clips that are not there yet."""
    from videoqa import world

    for folder, seeds in world_folders(options).values():
        world.make_world(folder, seeds, hard=options.world == "hard")


def load_sets(options: DataOptions, seed: int) -> tuple[list[Question], list[Question]]:
    """(questions to learn from, held-out questions) of a run. No video is in both, unless
    --eval_data says so."""
    from videoqa.questions import load_questions

    if not options.data:
        folders = [folder for folder, _ in world_folders(options).values()]
        return tuple(load_questions(os.path.join(folder, "questions.jsonl"), folder) for folder in folders)
    questions = load_questions(options.data, options.videos)
    if options.eval_data:
        held = load_questions(options.eval_data, options.eval_videos or options.videos)
        learned, tested = ({os.path.realpath(q.video) for q in of_set} for of_set in (questions, held))
        if both := learned & tested:
            say(f"{len(both)} videos are in both sets: the tables do not show what is new")
        return questions, held
    videos = sorted({q.video for q in questions})
    if len(videos) < 2:
        raise BadInput(f"{options.data}: only {len(videos)} video; give 2 or more, one is held out")
    order = torch.randperm(len(videos), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {videos[i] for i in order[: max(1, min(len(videos) - 1, round(options.eval_share * len(videos))))]}
    return [q for q in questions if q.video not in held], [q for q in questions if q.video in held]


# ---- batches ----


def build_prompt(tokenizer, question: Question, num_video_tokens: int, times: list[float]) -> list[int]:
    """Token ids: opening, the placeholders of the video, the question, and for a chat model the answer format
    and the frames' times (seconds). The answer follows at once."""
    text = prompt_text(question)
    if tokenizer.instructed:
        text += "\n" + instruction(question, tokenizer.think, times)
    return tokenizer.prompt(text, num_video_tokens)


def longest_text(tokenizer, questions: list[Question], num_frames: int) -> int:
    """Tokens of the longest prompt beside its video tokens. Before any video is read, so with times (seconds)
    that take as long to say as those of a video of 24 hours."""
    times = [86399.7] * num_frames
    return max(len(build_prompt(tokenizer, question, 0, times)) for question in questions)


def _pad(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows), default=0)
    width = -(-width // PROMPT_BLOCK) * PROMPT_BLOCK if left else width
    ids, mask = torch.full((len(rows), width), PAD_ID), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(len(row))
        ids[i, part], mask[i, part] = torch.tensor(row, dtype=torch.int64), True
    return ids, mask


def collate_prompts(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """prompt_ids (P, S) int64, prompt_mask (P, S) bool, padded on the left; nothing is ever cut off. S is a
    multiple of PROMPT_BLOCK."""
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
    videos: torch.Tensor | None = None  # (P,) int64, equal for equal videos; None: all differ

    def __getitem__(self, rows):
        videos = None if self.videos is None else self.videos[rows]
        return Prompts(self.prompt_ids[rows], self.prompt_mask[rows], self.video_embeds[rows], videos)


def load_clips(shown: list[tuple], num_frames: int, size: int, framing: str = "ffmpeg"):
    """Frames (C, K, 3, size, size) uint8 and times (C, K) seconds of C videos or parts of them, (path,) or
    (path, start, end); the first bad one raises VideoError."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads: FFmpeg decodes outside Python's lock
        clips = list(pool.map(lambda part: read_frames(part[0], num_frames, size, framing, *part[1:]), shown))
    return torch.stack([frames for frames, _ in clips]), torch.stack([times for _, times in clips])


def clips_at_once(num_frames: int, num_patches: int) -> int:
    """Clips to embed together: 2**15 patch tokens are 0.5 GB at width 4096, and one clip of 50 frames of CLIP
    ViT-L/14-336. At most 28, of which what a small CLIP makes stays in a CPU's cache."""
    return max(1, min(28, 2**15 // (num_frames * num_patches)))


def embed_videos(model, shown: list[tuple]) -> tuple[torch.Tensor, list[list[float]]]:
    """Frozen (C, N_video, D) of C videos or parts of them (`Question.shown`), and their frames' times in
    seconds. model: a VideoLM (embed_video, cfg, clip_cfg)."""
    times, cfg, clip_cfg = [], model.cfg, model.clip_cfg
    chunk = clips_at_once(cfg.num_frames, clip_cfg.num_patches)
    for start in show_progress(range(0, len(shown), chunk), "videos"):
        part = shown[start : start + chunk]
        frames, seconds = load_clips(part, cfg.num_frames, clip_cfg.image_size, cfg.framing)
        embeds = model.embed_video(frames, seconds)
        if start == 0:  # all of them at once: put together at the end they would need twice the room
            whole = embeds.new_empty((len(shown), *embeds.shape[1:]))
        whole[start : start + chunk] = embeds
        times += seconds.tolist()
    return whole, times


class PromptSet:
    """Questions with their videos embedded: each video, or part of one, is decoded and sent through the
    frozen CLIP and bridge once. Holds (number of videos, N_video, D) on the model's device."""

    def __init__(self, model, tokenizer, questions: list[Question]):
        self.questions, self.tokenizer = questions, tokenizer
        videos = sorted({question.shown for question in questions})
        self.video_embeds, times = embed_videos(model, videos)
        place = {video: i for i, video in enumerate(videos)}
        self.video_of = torch.tensor([place[question.shown] for question in questions])
        num_tokens = self.video_embeds.shape[1]
        self.prompts = [build_prompt(tokenizer, q, num_tokens, times[place[q.shown]]) for q in questions]
        longest, most = max(map(len, self.prompts)), model.cfg.max_positions
        if 0 < most < longest:
            raise BadInput(
                f"the longest prompt has {longest} tokens, {num_tokens} of them the video's, and the model"
                f" was made for {most} positions; take fewer with --num_frames or --video_tokens"
            )

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
        videos = self.video_of[rows].to(device)
        return Prompts(prompt_ids.to(device), prompt_mask.to(device), self.video_embeds[videos], videos)


class Batches:
    """Which questions each step asks, and the uniforms that its answers are drawn with. Both are the same
    whatever the number of processes, each of which takes its part; and all is seeded by the step, so that a
    resume has no generator's state to restore.

    num_prompts: P, over all processes; noise: the generator of the oracle's noise, seeded along; process:
    (index of this one, number of them); fill: batches of P questions that a step may ask.
    """

    def __init__(
        self, asked: PromptSet, num_prompts: int, seed: int, noise, process: tuple[int, int], fill=1
    ):
        self.asked, self.seed, self.noise, (self.index, self.num_processes) = asked, seed, noise, process
        self.P = min(num_prompts, len(asked)) // self.num_processes * self.num_processes
        of = f"of {len(asked)} questions, for {self.num_processes} processes"
        if not self.P:
            remedy = "give each process one, or start fewer processes"
            raise BadInput(f"--batch_prompts: {num_prompts} prompts a step {of}; {remedy}")
        if self.P < num_prompts:
            say(f"--batch_prompts {num_prompts}: {self.P} prompts a step {of}")
        self.fill = min(fill, len(asked) // self.P)
        self.steps_an_epoch = len(asked) // self.P // self.fill

    def rows(self, step: int, attempt: int = 0) -> torch.Tensor:
        """Numbers of all processes' questions, int64 (P,). Every epoch has an order of its own."""
        epoch, place = divmod(step, self.steps_an_epoch)
        generator = torch.Generator().manual_seed(self.seed * 2**20 + epoch)
        first = (place * self.fill + attempt) * self.P
        return torch.randperm(len(self.asked), generator=generator)[first : first + self.P]

    def watched(self, num_steps: int) -> dict[str, tuple]:
        """{id: video, or part of one} of the questions that a report shows: the first two of six steps,
        more of them early, when a policy changes most."""
        steps = {round((num_steps - 1) * (i / 5) ** 2) for i in range(6)}
        rows = [row for step in sorted(steps) for row in self.rows(step)[:2].tolist()]
        return {self.asked.questions[i].id: self.asked.questions[i].shown for i in rows}

    def of_step(self, step: int, G: int, T: int, attempt: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's part of the rows, and uniforms (P, G, T) in [0, 1) for them; seeds the noise.
        attempt: which of the step's `fill` batches."""
        number = step * self.fill + attempt
        generator = torch.Generator().manual_seed(self.seed * 2**20 + 2**19 + number)
        uniforms = torch.rand(self.P, G, T, generator=generator)
        self.noise.manual_seed((self.seed * 2**20 + number) * self.num_processes + self.index)
        share = self.P // self.num_processes
        mine = slice(self.index * share, (self.index + 1) * share)
        return self.rows(step, attempt)[mine], uniforms[mine]


# ---- commands ----


def main() -> int:
    from videoqa.datasets import NAMES, convert
    from videoqa.questions import check

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
