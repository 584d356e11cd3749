"""Knows who says what an answer is: each judge turns prompts, answers and references into labels and scores.

Must never know: what a figure or a verdict is made of.
"""
