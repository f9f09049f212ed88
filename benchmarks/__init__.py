"""Side-by-side measurements on named workloads: run ``python -m benchmarks.cpu`` from the repository's root.

``workloads`` names what is measured, ``data`` draws tables and inputs for it, ``dense`` and ``static_pkm`` are what the
torch backend is compared with, ``contestants`` puts all of them behind one interface, ``measure`` and ``memory`` take
time and memory, ``report`` turns samples into tables and judges the stated bounds.

Every claim is a ratio of medians of one run, printed with its spread, the device and the versions.
"""
