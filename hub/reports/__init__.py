"""What a merge would do, measured for whoever asks and written nowhere.

child    `python -m hub.reports.child`: measures one recipe after another; never in the web process
pool     a few such processes, kept for a while, and the queue before them
service  from a recipe to a report: resolved, planned, measured or remembered
routes   the HTTP surface

Imports: jobs (inputs, scratch folders, child processes) <- pool <- service <- routes.
"""
