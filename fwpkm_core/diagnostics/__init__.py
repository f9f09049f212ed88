"""What a memory does, for people: summaries for logs, reports on files, recordings of a reading and a page of one.

calls.py checks a call's trace and takes its tokens apart, summary.py makes numbers of it, doctor.py judges files,
record.py writes and reads recordings, history.py finds who wrote what, page.py makes the page. All of it runs on the
host, in NumPy, whatever framework the arrays belong to.
"""

from fwpkm.diagnostics.record import Recorder
from fwpkm.diagnostics.summary import summarize

__all__ = ["Recorder", "summarize"]


def __dir__() -> list[str]:
    return __all__
