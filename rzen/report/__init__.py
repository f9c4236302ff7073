"""The page a demo ends with: searches, scores, curves and settings in one HTML file that opens offline."""

from rzen.report.hits import Hit, Search, terminal_hits
from rzen.report.write import write_page

__all__ = ["Hit", "Search", "terminal_hits", "write_page"]
