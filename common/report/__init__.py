"""One self-contained HTML file from one or more runs."""

from common.report.page import Report, RunFolder, write_report

__all__ = ["Report", "RunFolder", "write_report"]
