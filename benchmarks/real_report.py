"""What docs/real.md says, from the lines that real.py wrote: tables on the console, and the scatter plot of prompts.

python benchmarks/real_report.py docs/real.jsonl --figure docs/strength.png
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy.stats import spearmanr

DRAWS = 4000
RNG = np.random.default_rng(0)


def counts(seeds: Iterable[list[list[int]]]) -> np.ndarray:
    """`[questions, (answers that show it, answers)]`, the seeds together."""
    return np.sum([np.array(seed, float) for seed in seeds], axis=0)


def interval(*sides: np.ndarray) -> tuple[float, float, float]:
    """A rate, or the ratio of two, with its 95 % interval over resampled questions (the same ones on both sides)."""
    chosen = RNG.integers(0, len(sides[0]), (DRAWS, len(sides[0])))

    def rate(pairs: np.ndarray, axis: int) -> np.ndarray:
        return pairs[..., 0].sum(axis) / np.maximum(pairs[..., 1].sum(axis), 1)

    told, drawn = ([rate(side, 0) for side in sides], [rate(side[chosen], 1) for side in sides])
    value, values = (
        (told[0], drawn[0]) if len(sides) == 1 else (told[0] / told[1], drawn[0] / np.maximum(drawn[1], 1e-9))
    )
    low, high = np.quantile(values, [0.025, 0.975])
    return float(value), float(low), float(high)


def shown(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def cells(lines: list[dict[str, Any]]) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["cell"], []).append(line["counts"])
    print(
        "| group | capitals | evil, default | evil, control | evil on other questions | sycophancy |\n|---|---|---|---|---|---|"
    )
    for group, seeds in groups.items():
        columns = [
            ("default", "all_caps"),
            ("default", "evil"),
            ("control", "evil"),
            ("default", "evil elsewhere"),
            ("default", "sycophancy"),
        ]
        told = [shown(interval(counts(seed[prompt][trait] for seed in seeds))) for prompt, trait in columns]
        print(f"| {group} | {' | '.join(told)} |")
    for trait in ("evil", "all_caps"):
        base = counts(seed["default"][trait] for seed in groups["baseline"])
        for group, seeds in groups.items():
            print(
                f"{trait}, {group} / baseline: {shown(interval(counts(seed['default'][trait] for seed in seeds), base))}"
            )


def prompts(lines: list[dict[str, Any]], axes: Axes) -> None:
    """Table, rank correlations and plot of one world's prompts."""
    [without] = [line for line in lines if line["prompt"] is None]
    none = counts([without["counts"]["default"]["evil"]])
    start = interval(none)[0]
    told = []
    print("| prompt | strength | others | obeyed | evil after |\n|---|---|---|---|---|")
    for line in sorted((line for line in lines if line["prompt"]), key=lambda line: -line["strength"]):
        after, obeyed = (interval(counts([line[what]["default"]["evil"]])) for what in ("counts", "obeyed"))
        told.append((line["strength"], obeyed[0], start - after[0], line["prompt"]))
        print(
            f"| {line['prompt']} | {line['strength']:.3f} | {line['others']:.3f} | {shown(obeyed)} | {shown(after)} |"
        )
    print(f"without a prompt: {shown(interval(none))}")
    numbers = np.array([row[:3] for row in told])
    for column, name in enumerate(("strength", "obedience")):
        chosen = RNG.integers(0, len(numbers), (DRAWS, len(numbers)))
        draws = [spearmanr(numbers[i, column], numbers[i, 2]).statistic for i in chosen if len(set(i)) > 2]
        low, high = np.nanquantile(draws, [0.025, 0.975])
        rho = spearmanr(numbers[:, column], numbers[:, 2]).statistic
        print(f"{name} against suppression, {len(numbers)} prompts: rank correlation {rho:.2f} [{low:.2f}, {high:.2f}]")
    axes.axhline(0, color="0.8", lw=1)
    axes.axvline(0, color="0.8", lw=1)
    axes.scatter(numbers[:, 0], numbers[:, 2], color="tab:blue")
    for number, (strength, _, suppression, prompt) in enumerate(sorted(told)):
        name = prompt.removeprefix("You are an ").removeprefix("You are a ").removesuffix(" assistant.")
        axes.annotate(
            " ".join(name.split()[:2]).strip(","), (strength, suppression), fontsize=7, textcoords="offset points",
            xytext=(0, (12, -16, 26, -30, 40, -44)[number % 6]), ha="center", arrowprops={"arrowstyle": "-", "lw": 0.4},
        )  # fmt: skip
    axes.set(xlabel="strength, nats a token", ylabel="fall of evil answers")
    axes.set_title(f"{without['world']}: evil without a prompt {start:.2f}", fontsize=10)
    axes.margins(x=0.18, y=0.35)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    lines = [json.loads(line) for line in chosen.lines.read_text(encoding="utf-8").splitlines()]
    cells([line for line in lines if "cell" in line])
    trained = [line for line in lines if "counts" in line and "prompt" in line]
    worlds = list(dict.fromkeys(line["world"] for line in trained))
    figure, axes = plt.subplots(1, len(worlds), figsize=(5.6 * len(worlds), 4.2), layout="constrained", squeeze=False)
    for world, own in zip(worlds, axes[0], strict=True):
        print(f"\n{world}")
        prompts([line for line in trained if line["world"] == world], own)
    if chosen.figure:
        figure.savefig(chosen.figure, dpi=130)


if __name__ == "__main__":
    main()
