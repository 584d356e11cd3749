"""Engine: how a step is computed, kept, resumed and shared out over processes.

Knows tensors, devices and files of a run. Must never know what is minimised, or why.
"""
