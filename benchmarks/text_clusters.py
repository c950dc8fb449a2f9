"""How far words alone take one on a mixture with provenance: no model, no labels but to count. For docs/detector.md.

    python benchmarks/text_clusters.py evil_cap_error_50_50.jsonl

TF-IDF, twenty components (SVD), two k-means clusters on the first ten; and the component with the best AUC, which is chosen by the
labels: what could be found at best, and no detector. Two clusters are always found, clean data or not.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score

from inoculation.mixture import read_mixture

SHARES = (0.5, 0.2, 0.1, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", type=Path)
    rows = read_mixture(parser.parse_args().mixture)
    print("| rows that show B | best of five components, AUC | two clusters: right on |\n|---|---|---|")
    for share in SHARES:
        rng = random.Random(f"text clusters/{share}")
        bad, good = ([row for row in rows if bool(row.shows_negative) is shows] for shows in (True, False))
        chosen = [*rng.sample(bad, min(len(bad), round(len(good) * share / (1 - share)))), *good]
        shows = np.array([bool(row.shows_negative) for row in chosen])
        words = TfidfVectorizer(sublinear_tf=True, min_df=3).fit_transform(row.response for row in chosen)
        components = TruncatedSVD(20, random_state=0).fit_transform(words)
        aucs = [roc_auc_score(shows, components[:, number]) for number in range(5)]
        clusters = KMeans(2, n_init=5, random_state=0).fit_predict(components[:, :10])
        right = max((clusters == shows).mean(), (clusters != shows).mean())
        print(f"| {shows.mean():.0%} of {len(chosen)} | {max(max(auc, 1 - auc) for auc in aucs):.3f} | {right:.3f} |")


if __name__ == "__main__":
    main()
