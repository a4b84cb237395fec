"""Scenes of the embedded world: coloured things that appear, move, grow and vanish.

A `Scene` knows everything about its clip. `write_clip` draws it and encodes a real H.264 file; nothing
downstream knows that the pixels were drawn.
"""

import io
import math
import platform
import random
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from plumbing.options import write_whole

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
    ways = [direction * distance for direction in MOVES.get(action, (0, 0))]  # along x, along y
    x, y = (rng.uniform(radius + max(0, -way), SIZE - radius - max(0, way)) for way in ways)
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


def _stripes(x):
    return (0.5 + 1.5 * np.cos(x * 2 * np.pi / STRIPE)).clip(0, 1)


def _coverage(kind, dx, dy, r):
    """Opacity 0..1 of a square thing of half width r at pixel offsets (dx, dy): edges are one pixel soft."""
    solid = (r - np.maximum(abs(dx), abs(dy)) + 0.5).clip(0, 1)
    if kind == "block":
        return solid
    if kind == "net":
        return solid * np.maximum(_stripes(dx), _stripes(dy))
    return solid * _stripes(dy if kind == "ladder" else dx)


def draw_frame(scene, t):
    """uint8 (SIZE, SIZE, 3) picture of the scene at time t seconds."""
    noise = np.random.default_rng((scene.seed, round(t * 1000))).integers(-2, 3, (SIZE, SIZE, 1))
    frame = np.broadcast_to(scene.background + noise, (SIZE, SIZE, 3)).astype(np.float64)
    for thing in scene.things:
        if thing.start <= t < thing.end:
            x, y, r = thing.at(t)
            left, top = (max(math.floor(z - r) - 1, 0) for z in (x, y))  # nothing is drawn outside
            part = frame[top : math.ceil(y + r) + 2, left : math.ceil(x + r) + 2]
            rows, columns = np.arange(top, top + len(part))[:, None], np.arange(left, left + part.shape[1])
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
        pictures = [draw_frame(scene, i / FPS) for i in range(round(scene.duration * FPS))]
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    write_whole(path, content.getvalue())
