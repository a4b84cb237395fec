"""README's first screen, from finished runs that differ in their seed only.

    python train.py --seed 0 --eval_every 10 --eval_subset 600 --out runs/seed0       # and seeds 1, 2
    python -m experiments.figures RUN [RUN ..] [--out figures] [--page README.md]

clips.jpg     clips of three questions that the first run's policy learned to answer, one below the other
learning.svg  accuracy on held-out questions by step: the mean of the runs, from their lowest to their highest
README.md     between its lines <!-- figures -->: these pictures, and the three answers before and after
"""

import io
import os
import re
from collections import defaultdict
from html import escape

from PIL import Image

from experiments.rivals import looks, mean_with_range
from experiments.study import between
from plumbing import page
from plumbing.options import ArgumentParser, BadInput, cell, run_script, write_whole
from plumbing.report import Run, before_and_after, read_run
from videoqa.video import frame_strip

WANTS = "name finished runs of train.py --eval_every N"


def learning_curve(runs: list[Run]) -> str:
    """Of the evaluations while the runs went on, which all ask the same questions."""
    curves = []
    for mode in ("greedy", "sampled"):
        points = mean_with_range([dict(looks(run.folder, mode, WANTS)) for run in runs])
        curves.append((f"{mode} answers", points))
    return page.figure(f"held-out accuracy by step, mean and range of {len(runs)} seeds", curves)


def learned(run: Run) -> tuple[list[tuple[dict, dict]], str]:
    """((row before, row after) of three questions, words on how many changed). The questions are the first
    ones that became right in the three categories where most did, each on a clip of its own."""
    before, after = before_and_after(run)
    better, worse = defaultdict(list), 0
    for name, new in after.items():
        if new["right"] and not before[name]["right"]:
            better[new["category"]].append((before[name], new))
        worse += before[name]["right"] and not new["right"]
    shown, videos = [], set()
    for pairs in sorted(better.values(), key=len, reverse=True)[:3]:
        pair = next((pair for pair in pairs if pair[1]["video"] not in videos), pairs[0])
        shown.append(pair)
        videos.add(pair[1]["video"])
    count = sum(map(len, better.values()))
    words = f"Of {len(after):,} held-out answers {count} became right and {worse} wrong"
    return shown, f"{words} (seed {run.config['seed']})."


def contact_sheet(videos: list[str]) -> bytes:
    """Six frames of each video, a row a video, as a JPEG."""
    strips = [Image.open(io.BytesIO(frame_strip(video))) for video in videos]
    height = max(strip.height for strip in strips) + 6
    sheet = Image.new("RGB", (strips[0].width, height * len(strips) - 6), "gray")
    for i, strip in enumerate(strips):
        sheet.paste(strip, (0, height * i))
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=88)
    return content.getvalue()


def plain(text: str) -> str:
    """For a cell of a Markdown table, where it reads as it is: no HTML, no picture, no emphasis."""
    return re.sub(r"[]\\`*_![]", lambda mark: f"&#{ord(mark[0])};", escape(cell(text), quote=False))


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", default="figures", help="folder of the pictures (figures)")
    parser.add_argument("--page", default="README.md", help="the page that shows them (README.md)")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    for run in runs:
        if not run.results or not run.evaluations:
            raise BadInput(f"{run.folder}: has not ended, or was not evaluated while it ran; {WANTS}")
    shown, words = learned(runs[0])
    if not shown:
        raise BadInput(f"{runs[0].folder}: no answer became right, so there is nothing to show; {WANTS}")
    cells = [[old["question"], old["greedy"], new["greedy"], new["gold"]] for old, new in shown]
    rows = ["| {} | {} | **{}** | {} |".format(*map(plain, texts)) for texts in cells]
    folder = os.path.relpath(args.out, os.path.dirname(args.page) or ".")
    lines = [f"![three clips, six frames of each]({folder}/clips.jpg)", ""]
    lines += ["| asked about these clips | before | after | right answer |", "|---|---|---|---|", *rows, ""]
    lines.append(f"{words} Below: held-out accuracy by step, mean and range of {len(runs)} seeds.")
    lines.append(f"![held-out accuracy by step]({folder}/learning.svg)")
    text = between(args.page, "figures", "\n".join(lines))
    drawing = learning_curve(runs).encode()
    sheet = contact_sheet([new["video"] for _, new in shown])
    os.makedirs(args.out, exist_ok=True)
    write_whole(os.path.join(args.out, "clips.jpg"), sheet)
    write_whole(os.path.join(args.out, "learning.svg"), drawing)
    write_whole(args.page, text.encode())
    print(f"{args.out}: clips.jpg and learning.svg; {args.page}: three answers")
    return 0


if __name__ == "__main__":
    run_script(main)
