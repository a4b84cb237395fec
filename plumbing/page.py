"""The pieces of report.html: tables, bars and curves as HTML and inline SVG. Texts from outside are escaped
here. No scripts, no fonts, nothing from elsewhere: the page's own policy forbids it."""

import base64
from html import escape
from itertools import cycle

COLORS = ("#2f6fde", "#d9822b", "#2b9d6a", "#b8489a", "#7a6ad8", "#8a8f2a", "#c8504a", "#3d9fb5")
COLORS += ("#5f6b7a", "#d6a90f")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
THEME = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #667085; --line: #d6dae1; --card: #ffffff;
  --back: #f5f6f8; --good: #2b9d6a; --bad: #d0564f; --was: #a9b1bf; --now: #2f6fde }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #3a4150;
  --card: #1d222c; --back: #13171e; --was: #5d6676; --now: #6ea0ff } }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif }
"""
STYLE = """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 24px; margin: 8px 0 } h2 { font-size: 19px; margin: 32px 0 8px }
h3 { font-size: 15px; margin: 4px 0 } p { margin: 6px 0 }
.dim { color: var(--dim); font-size: 13px } .wrong { color: var(--bad) }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  min-width: 0; break-inside: avoid }
.scroll { overflow-x: auto } .strip { width: 100%; display: block; border-radius: 4px }
table { border-collapse: collapse; width: 100%; font-size: 13px }
td, th { padding: 3px 6px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  max-width: 360px }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto; display: block } svg.bar { width: 72px; margin-top: 4px }
.key { white-space: nowrap; margin-right: 12px } .key i { display: inline-block; width: 10px; height: 10px;
  border-radius: 2px; margin-right: 5px }
@media print { body { background: none; max-width: none; padding: 0 } .card { border-color: #bbb } }
"""


def page(title: str, parts: list[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{THEME}{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def text(value) -> str:
    """Any value as escaped text, on one line, at most 600 characters."""
    words = value if isinstance(value, str) else repr(value)
    return escape(words if len(words) <= 600 else words[:600] + " ..")


class Html(str):
    """A text that is HTML already, and so is not escaped again."""


def table(heads: list[str], rows: list[list], right=()) -> Html:
    """right: numbers of the columns that hold numbers."""

    def line(tag, cells):
        inside = ""
        for i, cell in enumerate(cells):
            kind = ' class="n"' if i in right else ""
            inside += f"<{tag}{kind}>{cell if isinstance(cell, Html) else text(cell)}</{tag}>"
        return f"<tr>{inside}</tr>"

    lines = line("th", heads) + "".join(line("td", row) for row in rows)
    return Html(f'<div class="scroll"><table>{lines}</table></div>')


def card(title: str, *parts: str) -> str:
    """parts: HTML."""
    return f'<div class="card"><h3>{text(title)}</h3>{"".join(parts)}</div>'


def section(title: str, words: str, cards: list[str]) -> str:
    """A heading, a sentence and cards beside each other; "" without any card."""
    inside, sentence = "".join(cards), note(words) if words else ""
    return f'<h2>{text(title)}</h2>{sentence}<div class="grid">{inside}</div>' if inside else ""


def note(words, kind="dim") -> Html:
    return Html(f'<p class="{kind}">{text(words)}</p>')


def picture(content: bytes, words: str) -> Html:
    code = base64.b64encode(content).decode()
    return Html(f'<img class="strip" alt="{text(words)}" src="data:image/jpeg;base64,{code}">')


def advantage_bar(value: float, largest: float) -> Html:
    """A bar to the right of the middle, green, for an answer that is reinforced; to the left, red, else."""
    length = 48 * abs(value) / largest if largest else 0
    x, color = (50, "var(--good)") if value >= 0 else (50 - length, "var(--bad)")
    return Html(
        f'<svg class="bar" viewBox="0 0 100 12" role="img" aria-label="advantage {value:+.3f}">'
        f'<rect x="{x:.1f}" y="1" width="{length:.1f}" height="10" rx="2" fill="{color}"/>'
        '<line x1="50" x2="50" y1="0" y2="12" stroke="var(--dim)"/></svg>'
    )


def share_bars(bars: list[tuple[str, float, tuple | None, str]]) -> Html:
    """Horizontal bars of shares in 0..1: (label, share, (low, high) or None, colour), with whiskers."""
    height, rows = 15 * len(bars) + 2, []
    for i, (label, share, interval, color) in enumerate(bars):
        y = 15 * i + 1
        rows.append(f'<rect x="58" y="{y}" width="{200 * share:.1f}" height="12" rx="2" fill="{color}"/>')
        if interval:
            low, high = (58 + 200 * min(max(x, 0), 1) for x in interval)
            whisker = f"M{low:.1f} {y + 6}H{high:.1f}M{low:.1f} {y + 3}v6M{high:.1f} {y + 3}v6"
            rows.append(f'<path d="{whisker}" stroke="var(--ink)"/>')
        rows.append(f'<text x="54" y="{y + 10}" text-anchor="end">{text(label)}</text>')
        rows.append(f'<text x="266" y="{y + 10}">{100 * share:.1f} %</text>')
    words = ", ".join(f"{label} {100 * share:.1f} %" for label, share, *_ in bars)
    return Html(
        f'<svg viewBox="0 0 318 {height}" role="img" aria-label="{text(words)}">{"".join(rows)}</svg>'
    )


def chart(title: str, curves: list[tuple[str, list[tuple]]], percent=False) -> str:
    """A card with curves over the steps and their legend; "" if no curve has points. curves: (name, points),
    one colour each. A point is (step, value), or (step, value, low, high) for one with an interval."""
    curves = [(name, points) for name, points in curves if points]
    if not curves:
        return ""
    drawing = drawn(curves, percent)
    picture = f'<svg viewBox="0 0 312 150" role="img" aria-label="{text(title)}">{drawing}</svg>'
    legend = [
        f'<span class="key"><i style="background:{color}"></i>{text(name)}</span>'
        for (name, _), color in zip(curves, cycle(COLORS), strict=False)
    ]
    return card(title, picture, f'<p class="dim">{" ".join(legend)}</p>')


def figure(words: str, curves: list[tuple[str, list[tuple]]]) -> str:
    """Curves of shares as an SVG file of its own, that reads on light and dark pages."""
    in_row = 2 if max(len(name) for name, _ in curves) < 18 else 1
    legend, height = "", 158 + 14 * -(-len(curves) // in_row)
    for i, (name, _) in enumerate(curves):
        x, y = 44 + 132 * (i % in_row), 156 + 14 * (i // in_row)
        legend += f'<rect x="{x}" y="{y}" width="10" height="10" rx="2" fill="{COLORS[i % len(COLORS)]}"/>'
        legend += f'<text x="{x + 14}" y="{y + 9}">{text(name)}</text>'
    size = f'width="624" height="{2 * height}" viewBox="0 0 312 {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<title>{text(words)}</title><style>{THEME}</style>{drawn(curves, True)}{legend}</svg>\n"
    )


def drawn(curves: list[tuple[str, list[tuple]]], percent: bool) -> str:
    """The inside of a chart: axes, curves, and a dot with a whisker for each point that has an interval."""
    values = [point for _, points in curves for point in points]
    last = max(max(point[0] for point in values), 1)
    heights = [x for point in values for x in point[1:]]
    low, high = (0.0, 1.0) if percent else (min(0.0, *heights), max(heights))
    high = high if high > low else low + 1

    def place(step, value):
        x, share = 44 + 262 * step / last, (min(max(value, low), high) - low) / (high - low)
        return f"{x:.1f} {128 - 118 * share:.1f}"

    marks = []
    for value in (low, (low + high) / 2, high):
        label, y = f"{100 * value:.0f} %" if percent else f"{value:.2g}", place(0, value).split()[1]
        marks.append(f'<path d="M{place(0, value)}H306" stroke="var(--line)"/>')
        marks.append(f'<text x="40" y="{float(y) + 4:.1f}" text-anchor="end">{label}</text>')
    marks += [f'<text x="44" y="144">0</text><text x="306" y="144" text-anchor="end">step {last:g}</text>']
    for (_, points), color in zip(curves, cycle(COLORS), strict=False):
        stroke = f'fill="none" stroke-width="1.6" stroke="{color}"'
        line = "L".join(place(step, value) for step, value, *_ in points)
        marks.append(f'<path class="curve" d="M{line}" {stroke}/>')
        for step, value, *interval in points:
            if interval:
                x, y = place(step, value).split()
                whisker = "L".join(place(step, bound) for bound in interval)
                marks.append(f'<path d="M{whisker}" {stroke}/>')
                marks.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
    return "".join(marks)
