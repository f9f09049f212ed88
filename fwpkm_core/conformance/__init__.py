"""``fwpkm conform``: any backend judged by the reference, on the cases that the tests draw (SPEC.md §6).

Needs the extra ``fwpkm[conform]``; nothing else in the package imports this one before the command runs.
"""
