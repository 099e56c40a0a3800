"""From a request to video files: prompts, conditions, sampling, decoding, recipes, plans.

May import `checkpoints` and what lies below it.
"""
