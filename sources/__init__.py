"""Sources: what files, hub data sets, talks and texts look like, and the rows that they hold.

Knows layouts and fields. Must never know tokens, models or what a row is used for.
"""
