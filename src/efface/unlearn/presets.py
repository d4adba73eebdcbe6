"""Presets: names for a method with other defaults; nothing here is a class of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method under another name, with other defaults.

    Args:
        method: The name of the method that it is; the lineage says that name.
        options: What differs from its defaults; nested for what is inside, under ``"method"``.
        title: What it is.
        paper: Where it comes from.
        doc: What it does, in a few sentences.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    paper: str = ""
    doc: str = ""


PRESETS: dict[str, Preset] = {
    "partial-label-flip": Preset(
        "layerwise-partial",
        {"inner": {"method": "random-label"}, "pick": "gradient"},
        "Label flip, part of each layer",
        "Gogineni and Nadimi 2024",
        "Random labels on D_f; in every step a tenth of each layer moves, where its gradient is "
        "largest.\n\nlayerwise-partial around random-label, after Gogineni and Nadimi 2024; the "
        "fraction and the choice are ours.",
    ),
    "partial-ascent": Preset(
        "layerwise-partial",
        {"inner": {"method": "gradient-ascent"}, "pick": "gradient"},
        "Ascent, part of each layer",
        "Gogineni and Nadimi 2024",
        "Gradient ascent on D_f; in every step a tenth of each layer moves, where its gradient is "
        "largest.\n\nlayerwise-partial around gradient-ascent, after Gogineni and Nadimi 2024; "
        "the fraction and the choice are ours.",
    ),
    "partial-amnesiac": Preset(
        "amnesiac",
        {"keep": 0.1},
        "Amnesiac, part of each update",
        "Gogineni and Nadimi 2024",
        "Takes back a tenth of each layer of the training updates that saw D_f.\n\n"
        "amnesiac with keep = 0.1, after Gogineni and Nadimi 2024.",
    ),
}
"""Name → what it stands for."""
