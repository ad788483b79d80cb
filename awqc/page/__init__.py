"""The report as one HTML file that needs no network, and as plots."""

from awqc.page.evaluation import read_evaluation
from awqc.page.render import render

__all__ = ["read_evaluation", "render"]
