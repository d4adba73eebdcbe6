"""`AuditResult`: what an audit found, as a value, as ``audit.json`` and as ``report.html``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from efface.errors import InputError, listed, nearest
from efface.files import check_output, write_atomic

SCHEMA = "efface.audit/1"
VERDICTS = ("under-forgotten", "indistinguishable", "over-forgotten", "not measurable")


@dataclass(frozen=True)
class AuditResult:
    """What was asked, what was done and what was found, ready to be written down.

    Attributes:
        subject: Task, selector, method, sentences, models, cost, versions: plain JSON values.
        split: Numbers of records: ``{"forget": n, "retain": n, "test": n}``.
        findings: One mapping per audited number, with the keys of `efface.auditing.Finding`;
            rates are fractions, what is absent is ``None``.
        average_gap: Mean absolute difference to retraining over UA, RA, TA and MIA-efficacy.
        gap_a: The same with the MIA AUC in the place of MIA-efficacy.
        verdict: One of `VERDICTS`.
        not_shown: Sentences: what this audit does not show.

    Example:
        >>> result = AuditResult({}, {"forget": 1, "retain": 8, "test": 2},
        ...                      ({"name": "ua", "value": 0.5},), None, None, "not measurable", ())
        >>> result["ua"]["value"]
        0.5
        >>> AuditResult.from_json(result.to_json()) == result
        True
    """

    subject: Mapping[str, Any]
    split: Mapping[str, int]
    findings: tuple[Mapping[str, Any], ...]
    average_gap: float | None
    gap_a: float | None
    verdict: str
    not_shown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the verdict's word, which tools rely on.

        Raises:
            ValueError: If the verdict is none of `VERDICTS` (a programming error).
        """
        if self.verdict not in VERDICTS:
            raise ValueError(f"unknown verdict {self.verdict!r}; {nearest(self.verdict, VERDICTS)}")

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        """The finding of this name.

        Raises:
            KeyError: If there is none; the message names the nearest one.
        """
        found = {finding["name"]: finding for finding in self.findings}
        if name not in found:
            raise KeyError(f"no finding {name!r}; {nearest(name, found)}")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """The whole result under the keys of ``audit.json``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"schema": SCHEMA, **values}

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, one space of indent, a newline at the end.

        Raises:
            ValueError: If a number is NaN or infinite: absent values must be ``None``.
        """
        text = json.dumps(
            self.to_dict(), sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False
        )
        return text + "\n"

    @classmethod
    def from_json(cls, text: str) -> AuditResult:
        """Read what `to_json` wrote.

        Raises:
            InputError: If the text is no JSON, of another schema, or incomplete.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except ValueError as error:
            raise InputError(f"this is not an audit.json: {error}.") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise InputError(
                f"this is not an audit of schema {SCHEMA!r}; give the audit.json that "
                "'efface audit' wrote."
            )
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in data]
        if missing:
            raise InputError(f"this audit.json lacks {listed(missing)}; run the audit again.")
        values = {name: data[name] for name in names}
        values["findings"] = tuple(values["findings"])
        values["not_shown"] = tuple(values["not_shown"])
        try:
            return cls(**values)
        except ValueError as error:
            raise InputError(f"this audit.json cannot be used: {error}") from error

    def save(
        self,
        directory: str | Path,
        per_record: Mapping[str, Sequence[object]] | None = None,
        force: bool = False,
    ) -> Path:
        """Write ``report.html`` and ``audit.json``, each whole or not at all.

        ``audit.json`` comes last, so that where it is, the report is too.

        Args:
            directory: The folder; made when absent.
            per_record: Columns of equal length, name to values, for ``per_record.csv``; only on
                request, because they tell about single records.
            force: Replace an earlier audit.

        Returns:
            The folder.

        Raises:
            OutputError: If ``audit.json`` exists and ``force`` is not set.
            WriteError: If a file cannot be written.
        """
        from efface.report.html import audit_page  # jinja2 and matplotlib only when needed

        directory = Path(directory)
        check_output(directory / "audit.json", force)
        text, page = self.to_json(), audit_page(self)
        if per_record is None:  # an earlier audit's must not stay beside this one
            (directory / "per_record.csv").unlink(missing_ok=True)
        else:
            write_atomic(directory / "per_record.csv", _csv(per_record).encode(errors="replace"))
        # A path that is no text may be among the commands: it is escaped, not a crash.
        write_atomic(directory / "report.html", page.encode(errors="xmlcharrefreplace"))
        write_atomic(directory / "audit.json", text.encode(errors="backslashreplace"))
        return directory


def _refuse_constant(word: str) -> None:
    raise ValueError(f"it holds {word}, which is no JSON number")


def _csv(columns: Mapping[str, Sequence[object]]) -> str:
    """Columns as CSV; ``None`` is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()
