"""``efface`` and ``python -m efface``."""

from __future__ import annotations

from efface.cli import main

if __name__ == "__main__":
    main()
