"""The report: one self-contained page over the runs below some folders, and a leaderboard of models.

python -m ares_lightning.evaluation.report runs/a runs/b --output report.html --figure curves.png
python -m ares_lightning.evaluation.report --leaderboard runs/* --export leaderboard.csv --export table.tex
"""

from ares_lightning.evaluation.report.export import write_export
from ares_lightning.evaluation.report.leaderboard import write_leaderboard
from ares_lightning.evaluation.report.page import write_figure, write_report
from ares_lightning.evaluation.report.run import find_runs

__all__ = ["find_runs", "write_export", "write_figure", "write_leaderboard", "write_report"]
