"""What happened, for people: the event log of a run, live progress, the plan and the table of results."""
