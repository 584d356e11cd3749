"""Method: what a run minimises. Losses, draws, the terms of a recipe, and the plan of a run.

Knows the meaning of a term. Must never know files on disk, pages or how a batch is laid out.
"""
