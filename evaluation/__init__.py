"""Evaluation: measure a model before and after unlearning and under attack; write the page and the model card.

This room knows models as things that answer prompts and score texts. It must never know how training works.
"""
