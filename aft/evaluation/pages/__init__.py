"""The report as a page, as Markdown and as CSV: what cards say, laid out for people."""

from aft.evaluation.pages.build import Content, again, picture, publish, write_report
from aft.evaluation.pages.examples import attacked, kept

__all__ = ["Content", "again", "attacked", "kept", "picture", "publish", "write_report"]
