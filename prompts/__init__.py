"""Prompts: how a row becomes token ids, in the template and with the end tokens that the model's folder names.

Knows tokenizers and chat templates. Must never know files of rows, weights or losses.
"""
