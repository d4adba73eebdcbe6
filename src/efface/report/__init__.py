"""Findings to JSON and HTML: this package renders and computes nothing."""

from __future__ import annotations

from efface.report.bench import bench_page
from efface.report.html import audit_page, story_page
from efface.report.result import SCHEMA, AuditResult

__all__ = ["SCHEMA", "AuditResult", "audit_page", "bench_page", "story_page"]
