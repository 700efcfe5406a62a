"""Reports as pages."""

from mra_cli.report import AnalyzeReport
from mra_cli.search.report import SearchReport


def analyze_page(report: AnalyzeReport) -> str:
    return ""


def search_page(report: SearchReport) -> str:
    return ""
