"""Side-by-side measurements on named workloads: run ``python -m benchmarks.cpu`` from the repository's root.

Every claim is a ratio of medians of one run, printed with its spread, the device and the versions.

Commands: ``cpu``, ``frameworks`` and ``gpu`` (each with ``--against PATH``, the tree of another commit: ``compare``),
``digests``, ``compile_time``, ``packed``, ``serving``, ``cluster``, ``cluster_agreement``, ``faults`` and ``fuzz``.
They share ``workloads``: what is measured, ``measure``: time and memory, ``worker`` and ``ranks``: processes, and
``report``: options, tables and bounds.
"""
