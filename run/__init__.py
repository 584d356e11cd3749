"""Run: how a run is put together and kept. From options to a Setup, from a Setup to a checkpoint and back.

Knows which parts of the other rooms a run needs, and in which order. Must never know when a run stops, or what is best.
"""
