"""One self-contained HTML page on the result of a plan search, or on one plan: figures, tables and where they are from.

    from redco_like.report import write_report
    write_report("report.html", problem=problem, model=model, result=search.solve(space, pareto=True))
    write_report("report.html", plan=Plan.load("plan.json"))          # a saved plan with its estimate

No network, no script from elsewhere: the page can be mailed, printed and kept.
"""

from redco_like.report.execution import write_execution_report
from redco_like.report.page import report_html, write_report

__all__ = ["report_html", "write_execution_report", "write_report"]
