"""Curvature: per-sample gradients, diagonal Fisher, inverse-Fisher and Hessian products.

Batched, with a bound on memory, and flat in the number of records. Everything is evaluated in eval
mode on un-augmented records.
"""

from __future__ import annotations

from efface.curvature.fisher import Labels, diagonal_fisher, gradient
from efface.curvature.hessian import Krylov, LossCurvature, lanczos, lissa
from efface.curvature.inverse import inverse_fisher_product, projections
from efface.curvature.persample import evaluating, per_sample_gradients

__all__ = [
    "Krylov",
    "Labels",
    "LossCurvature",
    "diagonal_fisher",
    "evaluating",
    "gradient",
    "inverse_fisher_product",
    "lanczos",
    "lissa",
    "per_sample_gradients",
    "projections",
]
