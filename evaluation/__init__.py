"""Evaluation: what is measured and proved, before against after, under attack; the page and the card.

Knows models as things to be asked. Must never know how training works.
"""
