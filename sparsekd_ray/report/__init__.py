"""The report of a run: figures, findings, drawings, pages."""
