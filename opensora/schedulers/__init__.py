"""Samplers and training losses: rectified flow, IDDPM, DPM-Solver++. They call any model; may import `errors` only."""
