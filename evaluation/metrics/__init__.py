"""Knows the published formulas and the intervals: pure functions of texts and numbers.

Must never know: a model, a file, a report.
"""
