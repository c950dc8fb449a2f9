"""How right must a detector's flags be? Cells whose flags miss rows that show B, or take in others, at random. For docs/real-qwen.md.

    python benchmarks/real_cells.py sample FOLDER qwen_coder inoc_selective 0 --recall 0.75 --out O ...    # and --false-alarms 0.25
    python benchmarks/worse_flags.py docs/real-qwen.jsonl positive=all_caps --figure docs/real-flags.png

No flags at all are `baseline`, all rows flagged `inoc_general`, the labels `inoc_selective`: the corners of what there is.
"""

import argparse
from pathlib import Path
from typing import Any

from real_tables import RESAMPLES, chosen, rates, where

from inoculation.effects import GONE
from inoculation.figure import LABELS
from inoculation.intervals import CellRates, Counts, Interval, interval, mark

Flags = tuple[float, float]
"""Share of the rows that show B, and of the others, that are flagged."""
CORNERS: dict[str, Flags] = {"baseline": (0, 0), "inoc_selective": (1, 0), "inoc_general": (1, 1)}


def flags(line: dict[str, Any]) -> Flags | None:
    """A cell's flags; None: it is none of these cells."""
    if line["group"] not in CORNERS:
        return None
    recall, false_alarms = CORNERS[line["group"]]
    return line.get("recall", recall), line.get("false_alarms", false_alarms)


def gone(counts: Counts, group: str, trait: str, prompt: str) -> Interval:
    """The share of what `baseline` learned of B that is gone, under an evaluation prompt."""
    weights = counts.weights(counts.seeds("base", "baseline", group), [trait])
    of = {name: counts.rates(name, prompt, trait, weights) for name in ("base", "baseline", group)}
    return interval((of["baseline"] - of[group]) / (of["baseline"] - of["base"]), weights)


def draw(figure: Path, found: dict[Flags, Interval], trait: str, share: float) -> None:
    """Over recall and over false alarms; `share` of the rows show B."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for axis, at, fixed, label in (
        (axes[0], 0, 0.0, "recall: rows with B that are flagged\n(no other row is)"),
        (axes[1], 1, 1.0, "false alarms: other rows that are flagged\n(all with B are)"),
    ):
        points = sorted((key[at], one) for key, one in found.items() if key[1 - at] == fixed)
        low, high = ([abs(one.estimate - end) for _, one in points for end in [one[i]]] for i in (1, 2))
        axis.errorbar(
            [x for x, _ in points], [one.estimate for _, one in points], yerr=[low, high], fmt="o-", capsize=3
        )
        axis.axhline(GONE, color="0.6", linestyle=":")
        axis.set_xlabel(label)
        axis.grid(alpha=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    recalls = [i / 50 for i in range(51)]
    axes[0].plot(
        recalls, [found[1, 0].estimate * (1 - (1 - r) / (1 - share * r)) for r in recalls], color="0.6", linestyle="--",
        label="if B went by its share of the\nrows without a prompt",
    )  # fmt: skip
    axes[0].set_ylabel(f"share of the learned {LABELS.get(trait, trait).lower()}\nthat is gone, default prompt")
    axes[0].legend(frameon=False)
    drawn.savefig(figure, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("where", nargs="*", metavar="KEY=VALUE,...", type=where)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    try:
        lines = [
            line for line in chosen(arguments.lines, dict(arguments.where)) if line["group"] == "base" or flags(line)
        ]
        kinds = {key: f"flagged {key[0]:g} and {key[1]:g}" for line in lines if (key := flags(line))}
        names = kinds | {corner: group for group, corner in CORNERS.items() if corner in kinds}
        counts = Counts(
            [CellRates(names.get(flags(line) or (-1, -1), "base"), *rates(line)[1:]) for line in lines], RESAMPLES
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not {"base", *CORNERS} <= set(counts.groups()):
        parser.error(
            f"shares are counted between base and {', '.join(CORNERS)}, and there are {', '.join(counts.groups())}"
        )
    a, b, share = lines[0]["positive"], lines[0]["negative"], max(line["share"] for line in lines)
    found = {key: gone(counts, name, b, "default") for key, name in names.items() if name != "baseline"}
    found[CORNERS["baseline"]] = Interval(0.0, 0.0, 0.0)
    print(
        f"| flagged with B | of the others | {a} | {b}, default | control | Inoc-Def prompt | share gone, default | control | seeds |\n"
        + "|---" * 9
        + "|"
    )
    for key, name in sorted(names.items()):
        marks = [
            mark(counts, name, *place) for place in (("default", a), ("default", b), ("control", b), ("inoculation", b))
        ]
        shown = [f"{one.rate:.2f} [{one.low:.2f}, {one.high:.2f}]" if one else "" for one in marks]
        less = [found[key], gone(counts, name, b, "control")] if name != "baseline" else []
        shares = [f"{one.estimate:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in less] or ["", ""]
        seeds = str(len(counts.seeds("base", "baseline", name)))
        print(f"| {key[0]:g} | {key[1]:g} | " + " | ".join([*shown, *shares, seeds]) + " |")
    if arguments.figure:
        draw(arguments.figure, found, b, share)


if __name__ == "__main__":
    main()
