"""One encoded image → one array of pixels, of an agreed mode and size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np

from efface.errors import InputError

Mode = Literal["RGB", "L"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def decode(data: bytes | None, where: str, mode: Mode = "RGB", size: int | None = None) -> Pixels:
    """Pixels of one image.

    Grey, palette, CMYK and transparent images become what ``mode`` says (transparency is dropped);
    the orientation that a camera noted beside the pixels is not applied, as in torchvision.

    Args:
        data: A file's bytes, in any format that PIL reads.
        where: What an error calls it.
        mode: ``"RGB"`` or ``"L"`` (one channel, grey).
        size: The shorter edge is resized to so many pixels (bilinear) and the centre cropped to a
            square; ``None`` takes the image as it is.

    Returns:
        ``uint8 [C, H, W]``.

    Raises:
        InputError: If it cannot be decoded, has more than 8 bits a channel, or PIL is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("pillow") from error
    if data is None:
        raise InputError(f"{where} holds no image bytes; embed the images in the file.")
    broken = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            deep = opened.mode[0] in "IF"
            image = _sized(_converted(opened, mode), size)
            array: Pixels = np.asarray(image)
    except broken as error:
        raise InputError(f"{where} is no readable image; replace or leave it out.") from error
    if deep:
        raise InputError(f"{where} has more than 8 bits a channel; convert it to 8 bits.")
    return array[None] if mode == "L" else np.ascontiguousarray(array.transpose(2, 0, 1))


def _converted(image: Any, mode: Mode) -> Any:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way
    return image.convert(mode)


def _sized(image: Any, size: int | None) -> Any:
    if size is None or image.size == (size, size):
        return image
    from PIL.Image import Resampling

    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    wide = image.resize((width, height), Resampling.BILINEAR)
    return wide.crop((left, top, left + size, top + size))


def missing(library: str, path: Path | None = None) -> InputError:
    """The error for a library that is not installed."""
    what = f"to read {path}" if path else "to decode images"
    return InputError(f"{library} is needed {what}; run `pip install efface[parquet]`.")
