"""The server: /v1/videos as the OpenAI client speaks it, a queue that survives, and the page.

There are three kinds of processes: the HTTP process (`app.py`, `dispatcher.py`; imports no torch), a worker for each
device (`worker.py`), and a planner (`plan_worker.py`) that answers plans and opens uploads. Only the HTTP process
writes the database. See docs/serving.md.
"""
