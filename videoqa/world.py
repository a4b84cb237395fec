"""The embedded video world: short clips of coloured things that appear, move, grow and vanish.

A `Scene` knows everything about its clip, so every question has an exact answer. `write_clip` draws it and
encodes a real H.264 mp4 file; nothing downstream knows that the pixels were drawn. Questions carry
Video-MME's task names plus "Temporal Grounding" (time spans). The fine-tuning corpus (`corpus_answer`) has
faults on purpose, of the kind that web captions have; evaluation and the oracle never see those.

    python -m videoqa.world --out DIR --num_clips 8  # a few clips, their questions, and a picture of them all
    python -m videoqa.world --out DIR --num_clips 8 --grounded  # grounded questions, in grounded.jsonl
    python -m videoqa.world --out DIR --num_clips 8 --hard  # longer clips, more things, harder questions
"""

import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import av
import numpy as np
from PIL import Image

from plumbing.machine import show_progress
from plumbing.options import (
    ArgumentParser,
    BadInput,
    Count,
    Seed,
    checked,
    read_bytes,
    remove_leftovers,
    run_script,
    write_whole,
)

SIZE = 48  # pixels, width and height
FPS = 6
DURATION = 4.0  # seconds
HARD_DURATION = 6.0  # seconds of a clip of the hard world
STEP = 0.5  # seconds: everything begins and ends on this grid, one sampled frame per cell at K = 8
COLORS = {
    "red": (225, 45, 40),
    "green": (45, 185, 60),
    "blue": (50, 90, 235),
    "yellow": (235, 215, 50),
    "purple": (185, 60, 210),
    "white": (240, 240, 240),
}
KINDS = ("block", "ladder", "fence", "net")  # plain, rungs, bars, both: told apart at any size
RADII = {"small": 5.5, "large": 8.5}  # pixels
TRAVEL = 24, 30  # pixels that a moving thing covers while visible, from and to
STRIPE = 4.5  # pixels from rung to rung, bar to bar
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ACTIONS = (*MOVES, "still", "grows")
NUMBERS = ("zero", "one", "two", "three", "four")

# The categories whose corpus answers are mostly the category's usual answer, whatever the video shows.
USUAL_ANSWER = {
    "Action Recognition": "still",
    "Action Reasoning": "blue",
    "Temporal Perception": "red",
    "Temporal Reasoning": "red",
    "Temporal Grounding": "0.0 to 4.0 seconds",
}
# Loose wordings: true of almost everything, so they answer nothing.
LOOSE_ANSWERS = {
    "Object Recognition": ("some thing", "an object"),
    "Attribute Perception": ("some color", "a bright color"),
    "Counting Problem": ("some", "a few"),
    "Spatial Perception": ("in the video", "somewhere"),
    "Spatial Reasoning": ("near it", "somewhere"),
    "Action Recognition": ("something", "it is there"),
    "Action Reasoning": ("one of them", "some color"),
    "Temporal Perception": ("one of them", "some color"),
    "Temporal Reasoning": ("one of them", "some color"),
    "Temporal Grounding": ("for a while", "some time"),
}
CATEGORIES = tuple(LOOSE_ANSWERS)  # of the default world
LOOSE_ANSWERS |= dict.fromkeys(("Order", "Duration"), ("one of them", "some color"))  # of the hard one
USUAL_SHARE = 0.5  # share of corpus answers replaced by the usual one in the categories of USUAL_ANSWER
LOOSE_SHARE = 0.1  # share of loose answers in those categories, and ...
LOOSE_SHARE_OTHERS = 0.35  # ... in the others


@dataclass(frozen=True)
class Thing:
    """One object: visible in [start, end) seconds; (x, y) pixels is its centre when it appears."""

    color: str
    kind: str
    size: str
    action: str
    start: float
    end: float
    x: float
    y: float
    distance: float  # pixels that a moving object covers while visible

    def at(self, t):
        """Centre (x, y) and radius in pixels at time t seconds (start <= t < end)."""
        progress = (t - self.start) / (self.end - self.start)
        dx, dy = MOVES.get(self.action, (0, 0))
        radius = RADII[self.size] * (0.55 + 0.75 * progress if self.action == "grows" else 1.0)
        return self.x + dx * self.distance * progress, self.y + dy * self.distance * progress, radius


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # in order of appearance, start times distinct, colours and kinds distinct
    background: int  # grey level
    seed: int  # of the pixel noise
    duration: float = DURATION  # seconds


# ---------------------------------------------------------------------------------------------- making scenes


def _free_of_overlap(things, new):
    """True if `new` stays clear of every other thing at all times that both are visible."""
    for other in things:
        for t in np.arange(max(new.start, other.start), min(new.end, other.end), 0.25):
            (x, y, r), (u, v, s) = new.at(t), other.at(t)
            if math.hypot(x - u, y - v) < r + s + 1:
                return False
    return True


def _place(rng, color, kind, action, start, end):
    size = rng.choice(("small", "large"))
    distance = rng.uniform(*TRAVEL) if action in MOVES else 0.0
    radius = RADII[size] * (1.3 if action == "grows" else 1.0)
    dx, dy = MOVES.get(action, (0, 0))
    low_x, high_x = radius + max(0, -dx * distance), SIZE - radius - max(0, dx * distance)
    low_y, high_y = radius + max(0, -dy * distance), SIZE - radius - max(0, dy * distance)
    x, y = rng.uniform(low_x, high_x), rng.uniform(low_y, high_y)
    return Thing(color, kind, size, action, start, end, x, y, distance)


def make_scene(seed, hard=False):
    """A random scene of 1 to 3 things, or, hard, of 3 or 4 that stay for a shorter part of a longer clip. The
    same seed gives the same scene."""
    rng, duration = random.Random(f"hard {seed}" if hard else seed), HARD_DURATION if hard else DURATION
    counts = ((3, 4), (1, 2)) if hard else ((1, 2, 3), (3, 4, 2))
    shortest, longest = (1.5, 3.5) if hard else (2.0, DURATION)
    grid = [i * STEP for i in range(round(duration / STEP) + 1)]
    while True:  # until everything finds a place
        count = rng.choices(*counts)[0]
        colors, kinds = rng.sample(list(COLORS), count), rng.sample(KINDS, count)
        starts = sorted(rng.sample([x for x in grid if x <= duration - 2.0], count))
        things = []
        for color, kind, start in zip(colors, kinds, starts, strict=True):
            end = rng.choice([x for x in grid if start + shortest <= x <= start + longest])
            action = rng.choice(ACTIONS)
            for _ in range(20):
                thing = _place(rng, color, kind, action, start, end)
                if _free_of_overlap(things, thing):
                    things.append(thing)
                    break
        if len(things) == count:
            return Scene(tuple(things), rng.randint(20, 70), seed, duration)


# ------------------------------------------------------------------------------------------- drawing, writing


def _coverage(kind, dx, dy, r):
    """Opacity 0..1 of a square thing of half width r at pixel offsets (dx, dy): edges are one pixel soft."""
    solid = np.clip(r - np.maximum(abs(dx), abs(dy)) + 0.5, 0, 1)
    rungs, bars = (np.clip(0.5 + 1.5 * np.cos(x * 2 * np.pi / STRIPE), 0, 1) for x in (dy, dx))
    return solid * {"block": 1.0, "ladder": rungs, "fence": bars, "net": np.maximum(rungs, bars)}[kind]


def draw_frame(scene, t):
    """uint8 (SIZE, SIZE, 3) picture of the scene at time t seconds."""
    noise = np.random.default_rng((scene.seed, round(t * 1000))).integers(-2, 3, (SIZE, SIZE, 1))
    frame = np.broadcast_to(scene.background + noise, (SIZE, SIZE, 3)).astype(np.float64)
    for thing in scene.things:
        if thing.start <= t < thing.end:
            x, y, r = thing.at(t)
            left, top = (max(math.floor(z - r) - 1, 0) for z in (x, y))  # nothing is drawn outside
            right, bottom = (math.ceil(z + r) + 2 for z in (x, y))
            part = frame[top:bottom, left:right]
            rows, columns = np.ogrid[top : top + len(part), left : left + part.shape[1]]
            alpha = _coverage(thing.kind, columns - x, rows - y, r)[..., None]
            part[:] = part * (1 - alpha) + np.float32(COLORS[thing.color]) * alpha
    return frame.clip(0, 255).astype(np.uint8)


def write_clip(scene, path):
    """Encodes the scene as an H.264 mp4 file (yuv420p, its duration at FPS). One scene gives one file,
    byte for byte."""
    settings = "log-level=none:keyint=8"
    if platform.machine() in ("x86_64", "AMD64"):
        # With AVX-512 x264's result for so small a picture is not always the same: a third of the scenes had
        # two kinds of file. Code that every x86-64 CPU can run has one.
        settings += ":asm=MMX2,SSE2"
    options = {"preset": "veryfast", "crf": "16", "threads": "1", "x264-params": settings}
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for i in range(round(scene.duration * FPS)):
            frame = av.VideoFrame.from_ndarray(draw_frame(scene, i / FPS), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    write_whole(path, content.getvalue())


# ------------------------------------------------------------------------------------- captions and questions


ZONES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


def _zone(x, y):
    vertical = "top" if y < SIZE / 3 else "bottom" if y >= SIZE * 2 / 3 else ""
    horizontal = "left" if x < SIZE / 3 else "right" if x >= SIZE * 2 / 3 else ""
    return f"{vertical} {horizontal}".strip() or "center"


def frame_caption(scene, t, wrong=None, actions=False):
    """What one frame shows, size, colour, kind and place bound together, left to right: for CLIP, and with
    what each object is doing (`actions`, which one picture cannot show) for the alignment.

    wrong, a random.Random: the same caption with one word of one object replaced, most often its kind: a
    hard negative (NegCLIP, arXiv:2210.01936), without which CLIP need not see what its batch can do without.
    """
    shown = [(thing.at(t), thing) for thing in scene.things if thing.start <= t < thing.end]
    shown = sorted(shown, key=lambda pair: pair[0][0])
    parts = [[o.size, o.color, o.kind, _zone(x, y)] + [o.action] * actions for (x, y, _), o in shown]
    if wrong:
        choices = (tuple(RADII), tuple(COLORS), KINDS, ZONES)
        if not parts:
            parts = [[wrong.choice(c) for c in choices]]
        else:
            part, i = wrong.choice(parts), wrong.choices(range(4), (1, 1, 3, 1))[0]
            part[i] = wrong.choice([c for c in choices[i] if c != part[i]])
    return " and ".join(" ".join(part) for part in parts) or "nothing"


def descriptions(scene):
    """(question, long answer) for each object: kind, place, action and times. Without faults."""
    verbs = {m: f"moves {m}" for m in MOVES} | {"still": "stays still", "grows": "grows"}
    for o in scene.things:
        answer = f"{o.kind} at {_quadrant(o)} {verbs[o.action]} from {o.start} to {o.end} seconds"
        yield f"describe the object in {o.color}", answer


def annotations(scene):
    """(prompt, short answer) pairs that say everything about a scene, an attribute each, without faults: the
    alignment's second half. A prompt ends with the word it turns on, and no question is worded so."""
    things = scene.things
    for o in things:
        yield f"kind {o.color}", o.kind
        yield f"place {o.color}", _quadrant(o)
        yield f"action {o.color}", o.action
        yield f"times {o.color}", f"{o.start} to {o.end}"
        yield f"color {o.kind}", o.color
        if sum(p.action == o.action for p in things) == 1:
            yield f"color {o.action}", o.color
        for p in things:
            if o is not p and (relation := _relation(o, p)):
                yield f"{o.color} from {p.color}", relation
    yield "color first", things[0].color
    yield "color last", things[-1].color
    yield "number objects", NUMBERS[len(things)]
    for first, then in itertools.pairwise(things):
        yield f"after {first.color}", then.color
        yield f"before {then.color}", first.color


def _quadrant(thing):
    return f"{'top' if thing.y < SIZE / 2 else 'bottom'} {'left' if thing.x < SIZE / 2 else 'right'}"


def _relation(a, b):
    """Where a is, seen from b, if that is plain and the same whenever both are visible; else None."""
    answers = set()
    for t in np.arange(max(a.start, b.start) + STEP / 2, min(a.end, b.end), STEP):
        (x, y, _), (u, v, _) = a.at(t), b.at(t)
        if max(abs(x - u), abs(y - v)) < 1.5 * min(abs(x - u), abs(y - v)):
            return None
        if abs(x - u) > abs(y - v):
            answers.add("left" if x < u else "right")
        else:
            answers.add("above" if y < v else "below")
    return answers.pop() if len(answers) == 1 else None


def make_questions(scene, clip_name):
    """All questions of a scene, at most two a category: a list of JSON-ready
    dicts (design: data.py's rows)."""
    rng, things, rows = random.Random(scene.seed + 1), scene.things, []

    def ask(category, question, answer, **extra):
        rows.append(
            {"video": clip_name, "question": question, "answer": answer, "category": category, **extra}
        )

    for o in rng.sample(things, min(2, len(things))):
        ask("Object Recognition", f"what is the object in {o.color}", o.kind)
        ask("Attribute Perception", f"what color is the {o.kind}", o.color)
        ask("Action Recognition", f"what does the thing do that is {o.color}", o.action)
        span = f"{o.start} to {o.end} seconds"
        ask("Temporal Grounding", f"when is there an object in {o.color}", span, span=[o.start, o.end])
        if abs(o.x - SIZE / 2) > 3 and abs(o.y - SIZE / 2) > 3:
            ask("Spatial Perception", f"where is the object in {o.color}", _quadrant(o))
        if sum(p.action == o.action for p in things) == 1 and len(things) > 1:
            verb = {"still": "stays still", "grows": "grows"}.get(o.action, f"moves {o.action}")
            ask("Action Reasoning", f"what color {verb}", o.color)
    ask("Counting Problem", "how many objects appear", NUMBERS[len(things)])
    if len(things) > 1:
        which = rng.choice((0, -1))
        ask("Temporal Perception", f"what color appears {'last' if which else 'first'}", things[which].color)
        i = rng.randrange(len(things) - 1)
        first, then = things[i], things[i + 1]
        if rng.random() < 0.5:
            ask("Temporal Reasoning", f"what color appears after {first.color}", then.color)
        else:
            ask("Temporal Reasoning", f"what color appears before {then.color}", first.color)
        for a, b in itertools.permutations(rng.sample(things, 2)):
            if relation := _relation(a, b):
                ask("Spatial Reasoning", f"where is the {a.color} object from {b.color}", relation)
    for i, row in enumerate(rows):
        row["id"] = f"{clip_name.removesuffix('.mp4')}-{i}"
    return rows


def hard_questions(scene, clip_name):
    """`make_questions`, and questions that order, duration and counting decide: JSON-ready rows, truth exact.
    Ties in duration are not asked about. "longest" and its like are spelt in bytes."""
    rng, things, rows = random.Random(scene.seed + 4), scene.things, make_questions(scene, clip_name)

    def ask(category, question, answer):
        row = {"video": clip_name, "question": question, "answer": answer, "category": category}
        rows.append(row | {"id": f"{clip_name.removesuffix('.mp4')}-{len(rows)}"})

    which = rng.randrange(1, len(things) - 1)
    ask("Order", f"what color appears {('second', 'third')[which - 1]}", things[which].color)
    lengths = [o.end - o.start for o in things]
    for most, word in ((max, "longest"), (min, "shortest")):
        if lengths.count(most(lengths)) == 1:
            ask("Duration", f"what color stays {word}", things[lengths.index(most(lengths))].color)
    moving = sum(o.action in MOVES for o in things)
    ask("Counting Problem", "how many objects appear that moves", NUMBERS[moving])
    then = rng.randrange(1, len(things))
    ask("Counting Problem", f"how many objects appear before {things[then].color}", NUMBERS[then])
    return rows


def twins(scene):
    """The scene with its second thing in the first one's colour: two appearances of one colour, told apart by
    kind alone, whose times overlap, or, in half of those where two sampled frames of the first remain, touch:
    it leaves as the second appears. None where there is no second thing."""
    if len(scene.things) < 2:
        return None
    first, second, *others = scene.things
    if second.start - first.start >= 2 * STEP and random.Random(scene.seed + 3).random() < 0.5:
        first = replace(first, end=second.start)  # alone until then, so its faster way crosses nobody's
    return replace(scene, things=(first, replace(second, color=first.color), *others))


def grounded_questions(scene, clip_name):
    """Questions that ask for an answer and, by "and when", for the span [s] in which it is to be seen; for
    spans among others that overlap them; and for what order and duration decide. JSON-ready, truth exact.

    None of the default questions and no draw of theirs is touched. Things go by their colour, in a scene of
    `twins` by their kind. Ties in duration are not asked about. "longest" and its like are spelt in bytes.
    """
    rng, things, rows = random.Random(scene.seed + 2), scene.things, []
    alike = len({o.color for o in things}) < len(things)
    attribute = "kind" if alike else "color"

    def word(o):
        return getattr(o, attribute)

    def name(o):
        return f"the {o.color} {o.kind}" if alike else f"the object in {o.color}"

    def ask(category, question, answer, start, end):
        row = {"id": f"{clip_name.removesuffix('.mp4')}-g{len(rows)}", "video": clip_name}
        row |= {"question": question, "answer": answer or f"{start} to {end} seconds", "category": category}
        rows.append(row | {"span": [start, end], "duration": scene.duration})

    def pick(category, question, chosen_from, most):
        """Asks for the one of these things that stays longest or shortest, if it is one alone."""
        lengths = [o.end - o.start for o in chosen_from]
        if lengths.count(most(lengths)) == 1:
            o = chosen_from[lengths.index(most(lengths))]
            ask(category, f"what {attribute} {question} and when", word(o), o.start, o.end)

    for o in things[:2] if alike else rng.sample(things, min(2, len(things))):
        if alike:
            ask("Distractor Grounding", f"when is {name(o)} visible", "", o.start, o.end)
        else:
            ask("Grounded Recognition", f"what is {name(o)} and when", o.kind, o.start, o.end)
        ask("Grounded Action", f"what does {name(o)} do and when", o.action, o.start, o.end)
    if len(things) > 1:
        a, b = rng.sample(things, 2)
        start, end = max(a.start, b.start), min(a.end, b.end)
        if start < end:
            ask("Distractor Grounding", f"when is {name(a)} and {name(b)} visible", "", start, end)
        which = rng.choice((0, -1))
        o, question = things[which], f"what {attribute} appears {'last' if which else 'first'} and when"
        ask("Grounded Order", question, word(o), o.start, o.end)
        i = rng.randrange(len(things) - 1)
        o, question = things[i + 1], f"what {attribute} appears after {word(things[i])} and when"
        ask("Grounded Order", question, word(o), o.start, o.end)
        most, more = rng.choice(((max, "longer"), (min, "shorter")))
        pick("Grounded Duration", f"stays {more} of {word(a)} and {word(b)}", [a, b], most)
        most, more = rng.choice(((max, "longest"), (min, "shortest")))
        pick("Grounded Duration", f"stays {more}", things, most)
        if len(things) > 2:
            question = f"that appears after {word(things[0])} stays {more}"
            pick("Grounded Order and Duration", question, things[1:], most)
    return rows


def grounded_answer(row):
    """A right completion of a grounded question: its answer, then its span, as answers.py reads them."""
    span = f"{row['span'][0]} to {row['span'][1]} seconds"
    return span if row["answer"] == span else f"{row['answer']} {span}"


def corpus_answer(row, rng, faults=True):
    """The fine-tuning corpus' answer to a question: right, usual, or loose (shares above)."""
    category = row["category"]
    usual = USUAL_SHARE if category in USUAL_ANSWER else 0.0
    loose = LOOSE_SHARE if category in USUAL_ANSWER else LOOSE_SHARE_OTHERS
    draw = rng.random()
    if not faults or draw >= usual + loose:
        return row["answer"]
    return USUAL_ANSWER[category] if draw < usual else rng.choice(LOOSE_ANSWERS[category])


def vocabulary():
    """Every word that the world can say, sorted: the words of the default tokenizer."""
    scenes = [make_scene(seed) for seed in range(400)]
    texts = [*ZONES, *RADII, *COLORS, *KINDS]
    for scene in scenes:
        texts += [f"{q} {a}" for q, a in [*descriptions(scene), *annotations(scene)]]
        texts += [frame_caption(scene, 1.0)]
        texts += [row["question"] + " " + row["answer"] for row in make_questions(scene, "")]
    texts += [text for loose in LOOSE_ANSWERS.values() for text in loose] + [
        *USUAL_ANSWER.values(),
        *NUMBERS[:4],
    ]
    texts += [str(i * STEP) for i in range(9)] + ["center nothing answer visible : ? ."]
    return sorted({word for text in texts for word in text.replace("?", " ?").split()})


# -------------------------------------------------------------------------------------------------- the files


def clip_name(seed, hard=False):
    """File name of a scene's clip: the two worlds' clips of one seed may lie in one folder."""
    return f"{'hard' if hard else 'clip'}{seed:07d}.mp4"


def _make_one(folder, grounded, hard, seed):
    scenes = {clip_name(seed, hard): make_scene(seed, hard)}
    if grounded and (alike := twins(make_scene(seed))):
        scenes[f"twins{seed:07d}.mp4"] = alike
    for name, scene in scenes.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            write_clip(scene, path)
    ask = grounded_questions if grounded else hard_questions if hard else make_questions
    return [row for name, scene in scenes.items() for row in ask(scene, name)]


def _refuse_other_questions(path):
    """BadInput if the file holds other questions than the world's, whose ids begin with their clip's name."""
    lines = read_bytes(path, "make it readable").splitlines() if os.path.exists(path) else []
    if not all(re.fullmatch(rb'\{.*"id": "(clip|hard|twins)\d{7,}-g?\d+".*\}', line) for line in lines):
        raise BadInput(f"{path}: holds other questions than the world's; rename it, or take another folder")


def _end_with_parent():
    """In a worker: ends it as soon as the drawing process has ended, however that was killed."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_world(folder, seeds, workers=None, grounded=False, hard=False):
    """Writes the clips of these scene seeds into `folder` and their questions into `folder/questions.jsonl`,
    or, grounded, those of `grounded_questions` into `folder/grounded.jsonl`, on these clips and their twins.
    hard: the scenes and questions of the hard world.

    Returns the path of the JSONL file. Clips that are there already are kept: a scene's seed is its file
    name. What a killed drawing left behind is removed. Two processes may draw one folder at the same time.
    A folder that is drawn already is not written to. Raises BadInput where others' questions lie there.
    """
    path = os.path.join(folder, "grounded.jsonl" if grounded else "questions.jsonl")
    _refuse_other_questions(path)
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(folder)
    workers = workers or os.cpu_count()
    chunk = min(8, math.ceil(len(seeds) / (4 * workers)))  # small enough that all workers end together
    try:
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            rows = pool.map(partial(_make_one, folder, grounded, hard), seeds, chunksize=chunk)
            shown = show_progress(rows, "drawing clips", len(seeds))
            content = "".join(json.dumps(row) + "\n" for clip in shown for row in clip)
    except BrokenProcessPool as error:
        raise BadInput(f"{folder}: a drawing process was killed; run again, what is drawn is kept") from error
    write_whole(path, content.encode())
    return path


def contact_sheet(paths):
    """A picture of some clips, one a row, eight frames each, three times their size."""
    rows = []
    for path in paths:
        with av.open(path) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rows.append(np.concatenate(frames[len(frames) // 16 :: len(frames) // 8][:8], axis=1))
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    return sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder for clips, their questions and sheet.png")
    parser.add_argument("--num_clips", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the first scene")
    parser.add_argument("--grounded", action="store_true", help="answer and span, order and duration")
    parser.add_argument("--hard", action="store_true", help="longer clips of more things, harder questions")
    args = parser.parse_args()
    first, num = checked("seed", Seed, args.seed), checked("num_clips", Count, args.num_clips)
    seeds = range(first, first + num)
    with open(make_world(args.out, seeds, grounded=args.grounded, hard=args.hard)) as file:
        rows = [json.loads(line) for line in file]
    paths = [os.path.join(args.out, name) for name in dict.fromkeys(row["video"] for row in rows)]
    contact_sheet(paths).save(os.path.join(args.out, "sheet.png"))
    for row in rows:
        answer = grounded_answer(row) if args.grounded else row["answer"]
        print(f"{row['video']}  {row['category']:22}  {row['question']}  ->  {answer}")
    return 0


if __name__ == "__main__":
    run_script(main)
