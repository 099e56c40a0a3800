"""Ranks: the process group, sharded parameters (FSDP2), sequence and guidance parallelism. May import `acceleration`
and below.
"""
