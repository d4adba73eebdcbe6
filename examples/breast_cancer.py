"""A table instead of images: make a small network forget a clinic's records.

scikit-learn's breast-cancer table (569 real records of 30 numbers, benign or malignant) and an MLP.

The table has no patients, so that these are invented: record IDs (``p000`` … ``p568``, the row
numbers); subjects (patients ``s000`` … with one to three records each); the clinic that a record
comes from (``site``); and that the clinic ``east`` delivered a third of its labels the wrong way
round. That is a good reason for a deletion, and one whose effect can be seen. All of it is a
function of the row number, the same everywhere.

    python breast_cancer.py

README.md does the same step by step on the command line.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import efface

SITES = ("north", "south", "west", "east")


def mlp() -> nn.Module:
    """30 columns, two hidden layers, two classes."""
    return nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )


def invented(n: int) -> tuple[list[str], list[str], list[str], np.ndarray]:
    """IDs, subjects and sites of n rows, and which of their labels are wrong."""
    draw = np.random.default_rng(0)
    patients = np.repeat(np.arange(n), draw.integers(1, 4, size=n))[:n]
    site_of = draw.choice(len(SITES), size=n, p=[0.35, 0.25, 0.25, 0.15])
    sites = [SITES[site_of[p]] for p in patients]
    wrong = (np.asarray(sites) == "east") & (draw.random(n) < 1 / 3)
    return [f"p{i:03d}" for i in range(n)], [f"s{p:03d}" for p in patients], sites, wrong


def make_task() -> efface.Task:
    """370 records to train on, 80 to standardise with, 111 to test on."""
    table = load_breast_cancer()
    ids, subjects, sites, wrong = invented(len(table.target))
    labels = np.where(wrong, 1 - table.target, table.target)

    # A patient's records stay together: all of them in training, or all held out. Held-out
    # records with a wrong label are left out: they would measure nothing.
    patients = np.random.default_rng(1).permutation(np.unique(subjects))
    held = np.isin(subjects, patients[: round(0.36 * len(patients))])
    train, rest = np.flatnonzero(~held), np.flatnonzero(held & ~wrong)
    validation, test = rest[:80], rest[80:]

    # Means and deviations of the *validation* records: those of the training records would keep
    # something of the forgotten ones in the preprocessing, where no unlearner removes it.
    mean, deviation = table.data[validation].mean(0), table.data[validation].std(0)

    def part(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        columns = (table.data[rows] - mean) / deviation
        return torch.tensor(columns, dtype=torch.float32), torch.tensor(labels[rows])

    return efface.Task(
        network=mlp,
        train=part(train),
        validation=part(validation),
        test=part(test),
        ids=[ids[i] for i in train],
        subjects=[subjects[i] for i in train],
        columns={
            "site": [sites[i] for i in train],
            "mean_radius": table.data[train, 0],
            "mean_texture": table.data[train, 1],
        },
        fit=efface.Settings(epochs=60, batch_size=32, lr=0.05, weight_decay=1e-4),
        name="breast cancer, clinics invented",
    )


task = make_task()


def main() -> None:
    """Train, forget a clinic in two ways, retrain, audit, and say how it went."""
    trained = efface.train(task, seed=0)
    split = efface.Split.where(task, "site == 'east'")
    references = [efface.retrain(task, split, seed=seed) for seed in (1, 2, 3)]
    for method in (efface.unlearn.FineTune(), efface.unlearn.L1Sparse(alpha=3e-3, epochs=20)):
        forgot = efface.forget(trained, split, method, seed=0)
        result = efface.audit(trained, forgot, split, references)
        ua = result["ua"]
        print(
            f"{method.name}: of the clinic's {ua['n']} records it gets {ua['value']:.0%} wrong "
            f"(before {ua['original']:.0%}, retrained {ua['reference']:.0%}): {result.verdict}"
        )


if __name__ == "__main__":
    main()
