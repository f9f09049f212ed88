"""What ``fwpkm demo`` does: stream a text through an untrained memory and measure what a second reading recalls.

text.py turns files into token ids, contexts.py turns ids into queries and values, recall.py streams them through any
backend, report.py prints, picture.py draws, command.py ties them together. Only the last three need fwpkm[demo].
"""


class DemoError(Exception):
    """A problem that the person who started the demo can solve; the message is one line."""
