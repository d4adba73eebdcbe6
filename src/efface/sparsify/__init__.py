"""Pruning: criterion × selection × schedule × recovery."""

from efface.sparsify.criteria import CRITERIA, Criterion, Magnitude
from efface.sparsify.schedules import OneShot
from efface.sparsify.selection import select

__all__ = ["CRITERIA", "Criterion", "Magnitude", "OneShot", "select"]
