"""Draws doc/architectures_drawn.png: what each architecture of Nano is made of, side by side.

python doc/draw_architectures.py
"""

import argparse
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PLAIN, OWN, MATTER = "#e8edf3", "#fde3c8", "#1f2933"  # colours: a part as in nano, a part of its own, ink
NORM = "RMSNorm"
# name -> (its parts from the bottom to the top of a block; below, above and beside the blocks)
# A part is its text; with "*" before it, it differs from nano's.
ARCHITECTURES = {
    "nano": {
        "below": ["embedding"],
        "attention": [NORM, "q, k, v: grouped heads,\nQK-norm, RoPE", "causal attention"],
        "mlp": [NORM, "SwiGLU"],
        "above": [NORM, "head = embedding's matrix"],
        "cache": "keys and values,\na pair for each key/value head",
    },
    "llama3": {
        "below": ["embedding"],
        "attention": [NORM, "*q, k, v: grouped heads,\nRoPE stretched for long texts", "causal attention"],
        "mlp": [NORM, "SwiGLU"],
        "above": [NORM, "*head of its own"],
        "cache": "keys and values,\na pair for each key/value head",
    },
    "nanochat": {
        "below": ["embedding", "*norm without gains"],
        "attention": ["*norm without gains", "*q, k, v: grouped heads,\nRoPE, QK-norm without gains",
                      "causal attention"],
        "mlp": ["*norm without gains", "*ReLU², 4 times the width"],
        "above": ["*norm without gains", "*head of its own", "*soft-cap: 15 tanh(x / 15)"],
        "cache": "keys and values,\na pair for each key/value head",
    },
    "deepseek_v3": {
        "below": ["embedding"],
        "attention": [NORM, "*latent for keys and values,\none rotary key for all heads",
                      "causal attention"],
        "mlp": [NORM, "*shared expert + some of many\nexperts, chosen by a router"],
        "above": [NORM, "*head of its own"],
        "cache": "the latent and the rotary key,\nfor all heads",
        "beside": "*one more block\nforetells the token\nafter the next\n(training, drafts)",
    },
}  # fmt: skip
WIDTH, HEIGHT, GAP = 2.75, 0.5, 0.22


def box(axes, x, y, text, height=None):
    """A part with its middle at x and its foot at y; returns the y of its top."""
    own, text = text.startswith("*"), text.lstrip("*")
    height = height or HEIGHT + 0.22 * text.count("\n")
    axes.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, y), WIDTH, height, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=OWN if own else PLAIN, edgecolor="#9aa5b1", linewidth=0.8,
        )
    )  # fmt: skip
    axes.text(x, y + height / 2, text, ha="center", va="center", fontsize=9, color=MATTER)
    return y + height


def arrow(axes, start, end, bend=""):
    style = {"connectionstyle": bend} if bend else {}
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, shrinkA=0, shrinkB=0,
                        color="#52606d", linewidth=1, **style)
    )  # fmt: skip


def stack(axes, x, y, parts):
    """Parts on top of each other, joined by arrows; returns the y of the last one's top."""
    for part in parts:
        arrow(axes, (x, y), (x, y + GAP))
        y = box(axes, x, y + GAP, part)
    return y


def residual(axes, x, y, parts):
    """Parts whose result is added to the stream that passes by them."""
    begin = y + 0.1
    y = stack(axes, x, y, parts)
    arrow(axes, (x, y), (x, y + GAP))
    plus = y + GAP + 0.13
    axes.text(x, plus, "+", ha="center", va="center", fontsize=11, color=MATTER,
              bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": "#52606d"})  # fmt: skip
    side = x - WIDTH / 2 - 0.22
    axes.plot([x, side, side], [begin, begin, plus], color="#52606d", linewidth=1)
    arrow(axes, (side, plus), (x - 0.16, plus))
    return plus + 0.13


def draw(axes, x, name, parts):
    axes.text(x, 0.05, "tokens", ha="center", va="bottom", fontsize=9, color=MATTER)
    y = stack(axes, x, 0.35, parts["below"])
    foot = y + 0.12
    y = residual(axes, x, foot + 0.05, parts["attention"])
    y = residual(axes, x, y, parts["mlp"])
    left, right = x - WIDTH / 2 - 0.36, x + WIDTH / 2 + 0.14
    axes.add_patch(
        FancyBboxPatch((left, foot), right - left, y - foot + 0.08, boxstyle="round,pad=0,rounding_size=0.12",
                       facecolor="none", edgecolor="#7b8794", linewidth=1, linestyle="--")
    )  # fmt: skip
    axes.text(right - 0.06, y + 0.02, "n_layer ×", ha="right", va="top", fontsize=8, color="#52606d")
    top = stack(axes, x, y + 0.08, parts["above"])
    arrow(axes, (x, top), (x, top + GAP))
    axes.text(x, top + GAP + 0.04, "logits", ha="center", va="bottom", fontsize=9, color=MATTER)
    axes.text(x, -0.3, f"cache: {parts['cache']}", ha="center", va="top", fontsize=9, color="#52606d")
    axes.text(x, 9.85, name, ha="center", va="bottom", fontsize=13, fontweight="bold", color=MATTER)
    if "beside" in parts:
        at = x + WIDTH + 0.62
        box(axes, at, y + 0.1, parts["beside"])
        arrow(axes, (x, y + 0.16), (at - WIDTH / 2, y + 0.55), "arc3,rad=-0.1")


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    rcParams["font.family"] = "DejaVu Sans"
    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplots()
    for i, (name, parts) in enumerate(ARCHITECTURES.items()):
        draw(axes, 3.75 * i, name, parts)
    box(axes, 0, -1.5, "as in nano", 0.4)
    box(axes, 3.75, -1.5, "*its own", 0.4)
    axes.set(xlim=(-1.9, 16.4), ylim=(-1.6, 10.3), aspect="equal")
    axes.axis("off")
    path = Path(__file__).with_name("architectures_drawn.png")
    figure.savefig(path, dpi=100, facecolor="white")
    print(f"saved {path.name}")


if __name__ == "__main__":
    main()
