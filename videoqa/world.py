"""The embedded video world: questions, captions and a corpus about the scenes of scenes.py, and its folder.

A scene knows everything about its clip, so every question has an exact answer. Questions carry Video-MME's
task names plus "Temporal Grounding" (time spans). The fine-tuning corpus (`corpus_answer`) has faults on
purpose, of the kind that web captions have; evaluation and the oracle never see those.

    python -m videoqa.world --out DIR --num_clips 8  # a few clips, their questions, and a picture of them all
    python -m videoqa.world --out DIR --num_clips 8 --grounded  # grounded questions, in grounded.jsonl
    python -m videoqa.world --out DIR --num_clips 8 --hard  # longer clips, more things, harder questions
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
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
    json_lines,
    read_bytes,
    remove_leftovers,
    run_script,
    write_whole,
)
from videoqa.scenes import COLORS, KINDS, MOVES, RADII, SIZE, STEP, make_scene, write_clip

NUMBERS = ("zero", "one", "two", "three", "four")
VERBS = {move: f"moves {move}" for move in MOVES} | {"still": "stays still", "grows": "grows"}
ZONES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

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
LOOSE_ANSWERS |= dict.fromkeys(("Order", "Duration"), ("one of them", "some color"))  # of the hard one
USUAL_SHARE = 0.5  # share of corpus answers replaced by the usual one in the categories of USUAL_ANSWER
LOOSE_SHARE = 0.1  # share of loose answers in those categories, and ...
LOOSE_SHARE_OTHERS = 0.35  # ... in the others


# ------------------------------------------------------------------------------------- captions and questions


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
    shown = sorted((o for o in scene.things if o.start <= t < o.end), key=lambda o: o.at(t)[0])
    parts = [[o.size, o.color, o.kind, _zone(*o.at(t)[:2])] + [o.action] * actions for o in shown]
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
    for o in scene.things:
        answer = f"{o.kind} at {_quadrant(o)} {VERBS[o.action]} from {o.start} to {o.end} seconds"
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


def _row(clip_name, number, category, question, answer, **more):
    """A JSON-ready question; `number` tells it from the clip's other questions."""
    row = {"video": clip_name, "question": question, "answer": answer, "category": category, **more}
    return row | {"id": f"{clip_name.removesuffix('.mp4')}-{number}"}


def _by_stay(things, most):
    """The thing that stays longest (most=max) or shortest (min). None for a tie, which is not asked about."""
    lengths = [o.end - o.start for o in things]
    return things[lengths.index(most(lengths))] if lengths.count(most(lengths)) == 1 else None


def make_questions(scene, clip_name):
    """All questions of a scene, at most two a category, JSON-ready."""
    rng, things, rows = random.Random(scene.seed + 1), scene.things, []

    def ask(category, question, answer, **span):
        rows.append(_row(clip_name, len(rows), category, question, answer, **span))

    for o in rng.sample(things, min(2, len(things))):
        ask("Object Recognition", f"what is the object in {o.color}", o.kind)
        ask("Attribute Perception", f"what color is the {o.kind}", o.color)
        ask("Action Recognition", f"what does the thing do that is {o.color}", o.action)
        span = f"{o.start} to {o.end} seconds"
        ask("Temporal Grounding", f"when is there an object in {o.color}", span, span=[o.start, o.end])
        if abs(o.x - SIZE / 2) > 3 and abs(o.y - SIZE / 2) > 3:
            ask("Spatial Perception", f"where is the object in {o.color}", _quadrant(o))
        if sum(p.action == o.action for p in things) == 1 and len(things) > 1:
            ask("Action Reasoning", f"what color {VERBS[o.action]}", o.color)
    ask("Counting Problem", "how many objects appear", NUMBERS[len(things)])
    if len(things) > 1:
        which = rng.choice((0, -1))
        ask("Temporal Perception", f"what color appears {'last' if which else 'first'}", things[which].color)
        i = rng.randrange(len(things) - 1)
        first, then = things[i], things[i + 1]
        word, named, asked = ("after", first, then) if rng.random() < 0.5 else ("before", then, first)
        ask("Temporal Reasoning", f"what color appears {word} {named.color}", asked.color)
        for a, b in itertools.permutations(rng.sample(things, 2)):
            if relation := _relation(a, b):
                ask("Spatial Reasoning", f"where is the {a.color} object from {b.color}", relation)
    return rows


def hard_questions(scene, clip_name):
    """`make_questions`, and questions that order, duration and counting decide: JSON-ready rows, truth exact.
    "longest" and its like are spelt in bytes."""
    rng, things, rows = random.Random(scene.seed + 4), scene.things, make_questions(scene, clip_name)

    def ask(category, question, answer):
        rows.append(_row(clip_name, len(rows), category, question, answer))

    which = rng.randrange(1, len(things) - 1)
    ask("Order", f"what color appears {('second', 'third')[which - 1]}", things[which].color)
    for most, word in ((max, "longest"), (min, "shortest")):
        if o := _by_stay(things, most):
            ask("Duration", f"what color stays {word}", o.color)
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

    Their draws are their own, so the default questions stay as they are. Things go by their colour, in a
    scene of `twins` by their kind. "longest" and its like are spelt in bytes.
    """
    rng, things, rows = random.Random(scene.seed + 2), scene.things, []
    alike = len({o.color for o in things}) < len(things)
    attribute = "kind" if alike else "color"

    def word(o):
        return getattr(o, attribute)

    def name(o):
        return f"the {o.color} {o.kind}" if alike else f"the object in {o.color}"

    def ask(category, question, answer, start, end):
        answer, span = answer or f"{start} to {end} seconds", {"span": [start, end]}
        row = _row(clip_name, f"g{len(rows)}", category, question, answer, **span, duration=scene.duration)
        rows.append({"id": row["id"]} | row)  # the id stands first

    def ask_which(category, question, o):
        if o:
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
        ask_which("Grounded Order", f"appears {'last' if which else 'first'}", things[which])
        i = rng.randrange(len(things) - 1)
        ask_which("Grounded Order", f"appears after {word(things[i])}", things[i + 1])
        most, more = rng.choice(((max, "longer"), (min, "shorter")))
        question = f"stays {more} of {word(a)} and {word(b)}"
        ask_which("Grounded Duration", question, _by_stay([a, b], most))
        most, more = rng.choice(((max, "longest"), (min, "shortest")))
        ask_which("Grounded Duration", f"stays {more}", _by_stay(things, most))
        if len(things) > 2:
            question = f"that appears after {word(things[0])} stays {more}"
            ask_which("Grounded Order and Duration", question, _by_stay(things[1:], most))
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
    texts = [*ZONES, *RADII, *COLORS, *KINDS, *NUMBERS[:4], "center nothing answer visible : ? ."]
    texts += [*itertools.chain(*LOOSE_ANSWERS.values()), *USUAL_ANSWER.values()]
    texts += [str(i * STEP) for i in range(9)]
    for scene in map(make_scene, range(400)):
        texts += [frame_caption(scene, 1.0), *itertools.chain(*descriptions(scene), *annotations(scene))]
        texts += [row[column] for row in make_questions(scene, "") for column in ("question", "answer")]
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
    lines = read_bytes(path, "make it readable").splitlines() if os.path.exists(path) else []
    if not all(re.fullmatch(rb'\{.*"id": "(clip|hard|twins)\d{7,}-g?\d+".*\}', line) for line in lines):
        raise BadInput(f"{path}: holds other questions than the world's; rename it, or take another folder")
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(folder)
    workers = workers or os.cpu_count()
    chunk = min(8, math.ceil(len(seeds) / (4 * workers)))  # small enough that all workers end together
    try:
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            rows = pool.map(partial(_make_one, folder, grounded, hard), seeds, chunksize=chunk)
            shown = show_progress(rows, "drawing clips", len(seeds))
            content = json_lines(row for clip in shown for row in clip)
    except BrokenProcessPool as error:
        raise BadInput(f"{folder}: a drawing process was killed; run again, what is drawn is kept") from error
    except RuntimeError as error:  # Python would wait for the processes for ever
        for process in multiprocessing.active_children():
            process.kill()
        words = "allow more memory and threads, and run again: what is drawn is kept"
        raise BadInput(f"{folder}: the drawing processes failed ({error}); {words}") from error
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
