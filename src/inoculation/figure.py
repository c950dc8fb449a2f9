"""The study's figure: traits on x, one mark a group with its interval, one panel an evaluation prompt."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from inoculation.files import atomic
from inoculation.groups import GROUPS
from inoculation.intervals import CellRates, marks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PANELS = 2
"""Panels side by side, at most: more would not be read at a paper's width."""
SHAPES = dict(zip(GROUPS, "Xosd^vP*<>hHDp", strict=True))
LABELS = {"all_caps": "ALL_CAPS", "source_citing": "SOURCE_CITING"}


def _colours() -> dict[str, str]:
    return dict(zip(GROUPS, [*(f"C{index}" for index in range(10)), "black", "0.55", "navy", "darkgreen"], strict=True))


def draw(
    paths: Sequence[Path], cells: Sequence[CellRates], prompts: Sequence[str], traits: Sequence[str], title: str, note: str,
    resamples: int,
) -> None:  # fmt: skip
    """Draw the figure, in the format that each path's ending names (png, svg, pdf).

    Args:
        cells: every cell to show; several seeds of a group share one mark.
        prompts: one panel each.
        traits: the x axis, in order: A, B, then C.
        note: one line under the figure (who judged).
        resamples: bootstrap draws of the intervals.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [group for group in GROUPS if any(cell.group == group for cell in cells)]
    colours = _colours()
    columns = min(len(prompts), PANELS)
    lines = -(-len(prompts) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(1.5 + 5.2 * columns, 0.8 + 3.8 * lines),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for unused in axes.flat[len(prompts) :]:
        unused.set_visible(False)
    width = 0.8 / max(1, len(groups))
    for axis, prompt in zip(axes.flat, prompts, strict=False):
        points = marks(cells, prompt, resamples)
        for offset, group in enumerate(groups):
            present = [(x, points[group, trait]) for x, trait in enumerate(traits) if (group, trait) in points]
            x = [position + (offset - (len(groups) - 1) / 2) * width for position, _ in present]
            rates = [mark.rate for _, mark in present]
            n_seeds = max((len(mark.seeds) for _, mark in present), default=0)
            axis.errorbar(
                x, rates,
                yerr=[[m.rate - m.low for _, m in present], [m.high - m.rate for _, m in present]],
                fmt=SHAPES[group], color=colours[group], capsize=3, markersize=7,
                label=f"{GROUPS[group].label} ({n_seeds} seed{'s' if n_seeds != 1 else ''})",
            )  # fmt: skip
            for position, (_, mark) in zip(x, present, strict=True):
                if len(mark.seeds) > 1:
                    axis.plot([position] * len(mark.seeds), mark.seeds, "_", color=colours[group], alpha=0.6)
        for boundary in range(1, len(traits)):
            axis.axvline(boundary - 0.5, color="0.92", linewidth=1, zorder=0)
        roles = ["A", "B"] + ["C"] * (len(traits) - 2)
        axis.set_xticks(
            range(len(traits)),
            [f"{role}: {LABELS.get(trait, trait)}" for role, trait in zip(roles, traits, strict=True)],
        )
        _unjudged(axis, [x for x, trait in enumerate(traits) if not any((group, trait) in points for group in groups)])
        axis.set(xlim=(-0.5, len(traits) - 0.5), ylim=(-0.03, 1.03))
        axis.set_title(f"evaluated under: {prompt}", fontsize=10)
        axis.grid(axis="y", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of responses that show the trait", fontsize=9)
    figure.suptitle(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(groups), 2 * columns + (columns > 1)),
        fontsize=9,
        frameon=False,
        title=note,
        title_fontsize=8,
    )
    for path in paths:
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=140, format=path.suffix[1:])
    plt.close(figure)


PROMPT_SHAPES = "ovsD*XPh<>"
"""Of evaluation prompts, the default first."""


def draw_leakage(
    paths: Sequence[Path], cells: Sequence[CellRates], prompts: Sequence[str], traits: Sequence[str], title: str, note: str,
    resamples: int,
) -> None:  # fmt: skip
    """Draw how much of B each group shows under every prompt: a line a group, from the least to the most.

    Beside it A, and the share of coherent answers where they were judged, under the first prompt.

    Args:
        prompts: the first one is filled, with its interval.
        traits: A, B, then C.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {prompt: marks(cells, prompt, resamples) for prompt in prompts}
    first, (positive, negative) = found[prompts[0]], traits[:2]
    groups = [group for group in GROUPS if (group, negative) in first]
    figure, axis = plt.subplots(figsize=(8.4, 1.6 + 0.4 * len(groups)), layout="constrained")
    columns = [trait for trait in (positive, "coherence") if any((group, trait) in first for group in groups)]
    beside = axis.get_yaxis_transform()
    for y, group in enumerate(groups):
        own = {prompt: found[prompt][group, negative] for prompt in prompts if (group, negative) in found[prompt]}
        rates = [mark.rate for mark in own.values()]
        axis.plot([min(rates), max(rates)], [y, y], color="0.8", linewidth=2, zorder=0)
        default = own[prompts[0]]
        axis.errorbar(
            default.rate, y, xerr=[[default.rate - default.low], [default.high - default.rate]], fmt=PROMPT_SHAPES[0],
            color="black", capsize=3, markersize=8, zorder=3,
        )  # fmt: skip
        for prompt, mark in list(own.items())[1:]:
            shape = PROMPT_SHAPES[prompts.index(prompt) % len(PROMPT_SHAPES)]
            axis.plot(mark.rate, y, shape, markerfacecolor="none", color="C0", markersize=7, zorder=2)
        for place, trait in enumerate(columns):
            if (group, trait) in first:
                axis.text(
                    1.03 + 0.1 * place, y, f"{first[group, trait].rate:.2f}", transform=beside, va="center", fontsize=9
                )
    for place, trait in enumerate(columns):
        axis.text(
            1.03 + 0.1 * place,
            -0.9,
            "A" if trait == positive else "coherent",
            transform=beside,
            va="center",
            fontsize=9,
        )
    axis.set_yticks(range(len(groups)), [GROUPS[group].label for group in groups])
    axis.set(ylim=(len(groups) - 0.4, -0.6), xlim=(-0.03, 1.03), xlabel=f"share of responses that show B: {negative}")
    axis.set_title(title, fontsize=11, pad=22)
    axis.grid(axis="x", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    handles = [
        axis.plot([], [], PROMPT_SHAPES[place % len(PROMPT_SHAPES)], color="C0" if place else "black",
                  markerfacecolor="none" if place else "black", label=prompt)[0]
        for place, prompt in enumerate(prompts)
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(7, len(prompts)), frameon=False, fontsize=8,
        title=f"evaluated under; {note}", title_fontsize=8,
    )  # fmt: skip
    for path in paths:
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=140, format=path.suffix[1:])
    plt.close(figure)


class Point(NamedTuple):
    """A group at one value of a swept parameter."""

    value: str
    group: str
    rates: dict[str, tuple[float, float, float]]
    """Trait -> its rate and 95 % interval under the first evaluation prompt."""
    found: dict[str, tuple[float, float, float]]
    """`precision`, `recall` -> mean, least and largest over the seeds; where a detector's flags could be compared."""
    seeds: int


def draw_sweep(
    paths: Sequence[Path], points: Sequence[Point], values: Sequence[str], key: str, traits: Mapping[str, str], title: str
) -> None:  # fmt: skip
    """Draw how rates move with a parameter: one panel a trait, and one each for precision and recall where a detector was run.

    Args:
        points: a group at a value each.
        values: the x axis, in order.
        key: the parameter.
        traits: a panel's name -> the trait.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {name: lambda one, trait=trait: one.rates.get(trait) for name, trait in traits.items()}
    for name in ("precision", "recall"):
        if any(name in one.found for one in points):
            panels[f"{name} of the flags"] = lambda one, name=name: one.found.get(name)
    groups = [group for group in GROUPS if any(one.group == group for one in points)]
    lines = -(-len(panels) // PANELS)
    figure, axes = plt.subplots(
        lines, PANELS, figsize=(1.5 + 4.2 * PANELS, 1.0 + 3.0 * lines), sharex=True, squeeze=False, layout="constrained"
    )
    places = {value: place for place, value in enumerate(values)}
    for axis, (name, entry) in zip(axes.flat, panels.items(), strict=False):
        for offset, group in enumerate(groups):
            shown = [(places[one.value], entry(one)) for one in points if one.group == group and entry(one)]
            axis.errorbar(
                [place + (offset - (len(groups) - 1) / 2) * 0.05 for place, _ in shown],
                [middle for _, (middle, _, _) in shown],
                yerr=[[m - low for _, (m, low, _) in shown], [high - m for _, (m, _, high) in shown]],
                fmt=f"{SHAPES[group]}-", color=_colours()[group], capsize=3, markersize=6, linewidth=1,
                label=GROUPS[group].label,
            )  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.set(xticks=range(len(values)), xticklabels=values, ylim=(-0.03, 1.03))
        axis.grid(axis="y", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(key, fontsize=9)
    figure.suptitle(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(groups), 4), fontsize=9, frameon=False)
    for path in paths:
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=140, format=path.suffix[1:])
    plt.close(figure)


def _axes(size: tuple[float, float]) -> "tuple[Figure, Axes]":
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")


def _save(drawing: "Figure", path: Path) -> None:
    import matplotlib.pyplot as plt

    with atomic(path) as temporary:
        drawing.savefig(temporary, dpi=110, format="png")
    plt.close(drawing)


def _unjudged(axis: "Axes", places: Iterable[int]) -> None:
    """Say so where a trait has no mark."""
    for x in places:
        axis.text(x, 0.02, "not judged", ha="center", color="0.4", fontsize=8)


def draw_rates(path: Path, rates: dict[str, dict[str, Any]], label: str) -> None:
    """One cell's rates with their intervals: traits on x, one mark an evaluation prompt."""
    drawing, axis = _axes((7, 3.6))
    prompts = [prompt for prompt in rates if prompt != "oracle"]
    traits = [trait for trait in rates[prompts[0]] if trait != "coherence"]
    for offset, prompt in enumerate(prompts):
        shown = [
            (x, rates[prompt][t]) for x, t in enumerate(traits) if rates[prompt].get(t, {}).get("rate") is not None
        ]
        axis.errorbar(
            [x + (offset - (len(prompts) - 1) / 2) * 0.15 for x, _ in shown],
            [row["rate"] for _, row in shown],
            yerr=[[row["rate"] - row["low"] for _, row in shown], [row["high"] - row["rate"] for _, row in shown]],
            fmt="os^Dv"[offset % 5], capsize=3, label=f"evaluated under: {prompt}",
        )  # fmt: skip
    judged = {trait for prompt in prompts for trait in traits if rates[prompt].get(trait, {}).get("rate") is not None}
    _unjudged(axis, [x for x, trait in enumerate(traits) if trait not in judged])
    axis.set_xticks(range(len(traits)), traits)
    axis.set(xlim=(-0.5, len(traits) - 0.5), ylim=(-0.03, 1.03), ylabel="share of responses")
    axis.set_title(label, fontsize=9)
    axis.grid(axis="y", color="0.9")
    axis.legend(fontsize=8, frameon=False)
    _save(drawing, path)


def draw_loss(path: Path, log: list[dict[str, Any]], label: str) -> None:
    """The training loss by step."""
    drawing, axis = _axes((7, 3.2))
    if log:
        axis.plot([row["step"] for row in log], [row["loss"] for row in log])
    else:
        axis.text(0.5, 0.5, "no training", ha="center", transform=axis.transAxes)
    axis.set(xlabel="step", ylabel="loss, nats a response token")
    axis.set_title(label, fontsize=9)
    _save(drawing, path)
