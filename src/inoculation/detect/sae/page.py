"""A static page for a person: what each latent responds to, and why each example was flagged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inoculation.detect import words
from inoculation.detect.sae.explain import Context
from inoculation.detect.sae.rank import Latent
from inoculation.files import atomic
from inoculation.mixture import Row

SHOWN_EXAMPLES = 200
SHOWN_CONTEXTS = 9


def write(
    path: Path,
    template: Path,
    title: str,
    rows: Sequence[Row],
    latents: Sequence[Latent],
    explanations: Sequence[dict[str, Any]],
    classes: dict[str, dict[str, str]],
    flags: Sequence[dict[str, Any]],
    detected: dict[str, Any],
    prompt: str | None,
    mark: float,
    pieces: Mapping[int, Sequence[tuple[str, int]]],
) -> None:
    """Write one self-contained HTML file. Text of the data set is escaped: it cannot become markup.

    Args:
        template: of the page (Jinja).
        rows: the mixture; only questions and responses are shown.
        classes: latent -> {"class": yes | neutral | no}.
        flags: one a row, as `flags.jsonl` has them.
        detected: `detection.json`.
        mark: share of a context's maximum above which a token is marked.
        pieces: of some rows, as `read_marked` gives them.
    """
    from jinja2 import Environment

    described = {row["latent"]: row["description"] or "(could not be described)" for row in explanations}

    def contexts(raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
        chosen = []
        for source in ("mixture", "conversational", "pretraining"):
            own = [Context(**entry) for entry in raw if entry["source"] == source]
            for context in own[: SHOWN_CONTEXTS // 3]:
                peak = max(context.activations)
                shown = zip(context.tokens, [v / peak for v in context.activations], context.marked(mark), strict=True)
                chosen.append({"source": source, "shown": list(shown)})
        return chosen

    table = [
        {
            **latent._asdict(),
            "class": classes[str(latent.latent)]["class"],
            "description": described[latent.latent],
            "link": explanation["link"],
            "contexts": contexts(explanation["contexts"]),
        }
        for latent, explanation in zip(latents, explanations, strict=True)
    ]
    order = sorted((i for i, flag in enumerate(flags) if flag["flagged"]), key=lambda i: -flags[i]["score"])
    flagged = [
        {
            "row": i,
            "score": flags[i]["score"],
            "question": rows[i].prompt[-1].content[:160],
            "response": rows[i].response,
            "words": pieces.get(i),
            "why": [(latent, described[latent]) for latent in flags[i]["latents"]],
        }
        for i in order[:SHOWN_EXAMPLES]
    ]
    page = Environment(autoescape=True).from_string(template.read_text(encoding="utf-8"))
    with atomic(path) as temporary:
        temporary.write_text(
            page.render(words=words, title=title, latents=table, flagged=flagged, detected=detected, prompt=prompt),
            encoding="utf-8",
        )
