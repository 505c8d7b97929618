"""The report of a comparison: one self-contained HTML page, and the same tables as Markdown."""
