"""What work costs: counted operations, free memory, peak speeds, remembered times.

May import `acceleration` and what lies below it.
"""
