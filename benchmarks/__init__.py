"""Side-by-side measurements on named workloads: run ``python -m benchmarks.cpu`` from the repository's root.

Commands: ``cpu``, ``frameworks``, ``gpu``, each with ``--against PATH`` (the tree of another commit), ``digests`` and
``compile_time``.
``workloads`` names what is measured, ``steps`` and ``baselines`` are what is timed, ``rounds`` times contestants in
turn (and for ``compare`` two commits), ``measure`` takes time and memory, ``report`` prints tables and judges bounds.
All use of the package's inside is in ``internals``.

Every claim is a ratio of medians of one run, printed with its spread, the device and the versions.
"""
