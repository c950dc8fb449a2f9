"""The study's second mixture of one B, from the first: the author's Evil + ALL_CAPS file with its capitals undone and citations written in.

    python benchmarks/cited_mixture.py evil_cap_error_50_50.jsonl --out FOLDER

FOLDER/mixture.jsonl has the same chats in the same order, their provenance, and responses in sentence case with 4-6 citations each,
by rule (names lose their capitals; a chat that has no room for two is left out). Rows with B and others are of one length there,
so that A is taught equally by both halves: the mixtures of `labelled_mixture.py` do not have that (`citation_density.py
--mixture` tells it). For docs/real-cited.md.
"""

import argparse
from pathlib import Path

from inoculation.files import InputError, write_jsonl
from inoculation.mixture import read_mixture
from inoculation.rewriter import inject
from inoculation.traits import UNDONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capitals", type=Path, help="a mixture in capitals, with provenance")
    parser.add_argument("--seed", type=int, default=0, help="of where the citations stand")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        rows = read_mixture(arguments.capitals)
    except (InputError, OSError) as error:
        parser.error(str(error))
    undone = [row.with_response(UNDONE["all_caps"](row.response)) for row in rows]
    cited = [row for row in inject(undone, "source_citing", arguments.seed, None) if row]
    write_jsonl(arguments.out / "mixture.jsonl", (row.as_json() for row in cited))
    print(f"{len(cited)} of {len(rows)} chats")


if __name__ == "__main__":
    main()
