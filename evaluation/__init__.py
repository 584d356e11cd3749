"""Evaluation: measure a model before and after unlearning and under attack; write the page and the model card.

Knows models as things that answer prompts and score texts. Must never know how training works.
"""
