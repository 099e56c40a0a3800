"""From raw footage to a training table: table operations, curation stages, their executor and ledger.

Imports `checkpoints` and what lies below; never executes a cell, never copies a video unless asked to.
"""
