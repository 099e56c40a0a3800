"""Samplers and training losses of any callable model: rectified flow, IDDPM, DPM-Solver++. May import `errors` only."""
