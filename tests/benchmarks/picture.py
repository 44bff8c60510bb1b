"""Draw the README's first picture, the three methods side by side: .github/methods.svg.

python tests/benchmarks/picture.py
"""

from pathlib import Path

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#00795A"
WIDTH, ROW = 1000, 236


def text(x: float, y: float, words: str, size: int = 14, colour: str = "#222", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, w: float, *lines: str) -> str:
    """A box 56 high whose first line is what it is; below it what it learns."""
    parts = [f'<rect x="{x}" y="{y}" width="{w}" height="56" rx="6" fill="#f4f4f4" stroke="#555"/>']
    for i, line in enumerate(lines):
        parts.append(text(x + w / 2, y + 33 + 18 * (i - (len(lines) - 1) / 2), line, 14 if i == 0 else 13))
    return "".join(parts)


def arrow(*points: tuple[float, float], colour: str = "#555", dashed: bool = False) -> str:
    """A line through the points with a head at the last; dashed: the way of a gradient."""
    line = " ".join(f"{x},{y}" for x, y in points)
    dash = 'stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6" {dash} '
        f'marker-end="url(#head{colour[1:]})"/>'
    )


def gradient(y: float, start: float, ends: list[float], colour: str, words: str, at: float, depth: float) -> str:
    """A gradient's way from the loss at x = start back to what it moves, below boxes that end at y."""
    ways = [[(start, y), (start, y + depth), (end, y + depth), (end, y + 3)] for end in ends]
    drawn = "".join(arrow(*way, colour=colour, dashed=True) for way in ways)
    return drawn + text(at, y + depth - 6, words, 13, colour)


def chain(y: float, boxes: list[tuple], gap: float = 34) -> tuple[str, list[float]]:
    """Boxes (width, *lines) from left to right with arrows between; the drawing and every box's centre."""
    x, parts, centres = 20, [], []
    for width, *lines in boxes:
        if centres:
            parts.append(arrow((x - gap, y + 28), (x - 4, y + 28)))
        parts.append(box(x, y, width, *lines))
        centres.append(x + width / 2)
        x += width + gap
    return "".join(parts), centres


def joint(y: float) -> str:
    drawn, (_, policy, net, loss, *_) = chain(
        y,
        [
            (150, "images", "D_train, D_val"),
            (190, "soft policy", "z, p, μ"),
            (190, "DARTS supernet", "w, α"),
            (120, "loss"),
            (176, "train from scratch", "derived cell, policy"),
        ],
    )
    drawn += gradient(y + 56, loss - 20, [policy, net + 30], BLUE, "Eq. 9, on D_val", 395, 48)
    return drawn + gradient(y + 56, loss + 20, [net - 30], ORANGE, "Eq. 10, on D_train", 612, 86)


def dha(y: float) -> str:
    drawn, (_, policy, net, loss, step) = chain(
        y,
        [
            (150, "images", "D_train"),
            (190, "a pair of operations", "drawn from p(τ)"),
            (190, "sparse supernet", "θ; b, ISTA gives α"),
            (120, "losses", "L₁ … L_B, mean"),
            (176, "SGD moves θ", "lr, wd"),
        ],
    )
    drawn += gradient(y + 56, loss - 20, [net], ORANGE, "of the mean", 605, 30)
    drawn += gradient(y + 56, loss + 20, [policy], BLUE, "Eq. 2: pairs with large losses gain", 515, 68)
    way = arrow((loss + 40, y + 56), (loss + 40, y + 98), (step, y + 98), (step, y + 59), colour=GREEN, dashed=True)
    return drawn + way + text((loss + step) / 2 + 40, y + 116, "Eq. 3: ∇L(θ⁺) of the next batch", 13, GREEN)


def sequential(y: float) -> str:
    first, (_, policy, net, *_) = chain(
        y,
        [
            (150, "images"),
            (190, "soft policy", "z, p, μ"),
            (190, "WideResNet", "classifier and critic"),
            (120, "DARTS", "w, α"),
            (176, "train from scratch", "derived cell, policy"),
        ],
    )
    first += gradient(y + 56, net, [policy], BLUE, "looks real? keeps its label?", 411, 30)
    second, _ = chain(
        y + 104,
        [
            (150, "images"),
            (190, "sparse supernet", "θ; b, ISTA gives α"),
            (190, "DHA from scratch", "that genotype; τ, lr, wd"),
        ],
    )
    return first + second


def main() -> None:
    parts, y = [], 0
    titles = {
        "joint_darts_faa.py: policy and architecture in one differentiable search, then training": joint,
        "dha.py: policy, hyper-parameters and architecture while the network trains; nothing is retrained": dha,
        "baseline_sequential.py: one part after the other": sequential,
    }
    for title, draw in titles.items():
        parts += [text(20, y + 28, title, 17, "#000", "start"), draw(y + 46)]
        y += ROW
    heads = "".join(
        f'<marker id="head{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{c}"/></marker>'
        for c in ("#555", BLUE, ORANGE, GREEN)
    )
    note = text(WIDTH - 20, y + 8, "solid: images and results; dashed: which gradient goes where", 13, anchor="end")
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 24}" '
        f'font-family="Helvetica, Arial, sans-serif"><defs>{heads}</defs>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}{note}</svg>\n'
    )
    (Path(__file__).parents[2] / ".github" / "methods.svg").write_text(svg)


if __name__ == "__main__":
    main()
