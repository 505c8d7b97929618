"""Corpora in tables, on the hub and in text files, each resolved once to the files that the page reader takes.

The libraries of the extra `[lake]` are imported only when such an address is opened.
"""
