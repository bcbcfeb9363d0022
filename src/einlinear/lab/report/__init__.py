"""What a study found, shown: one HTML page, one figure, one table for the terminal."""

from einlinear.lab.report.law import save_law_figure as save_law_figure
from einlinear.lab.report.live import watch as watch
from einlinear.lab.report.page import save_figure as save_figure
from einlinear.lab.report.page import write_report as write_report
from einlinear.lab.report.searches import print_exploration as print_exploration
from einlinear.lab.report.terminal import print_summary as print_summary
