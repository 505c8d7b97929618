"""Reports for people: the event log of a run, live progress, the plan, the table of results, the HTML page."""
