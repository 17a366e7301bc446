"""One self-contained HTML file from one or more runs."""

from common.report.page import Report, write_report
from common.report.runs import RunFolder

__all__ = ["Report", "RunFolder", "write_report"]
