"""The requests to forget, and what followed.

Knows what was asked, by whom, when, and which state of the model answered it. Must never know how a model is trained.
"""
