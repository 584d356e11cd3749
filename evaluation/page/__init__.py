"""Knows how a report is shown: which figure decides a card, which answers stand for all, what a number looks like.

Must never know: how a figure was measured, or what a verdict follows from.
"""
