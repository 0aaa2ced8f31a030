"""Rules × the model as the user wrote it: parameters, matching, groups, comparing. Uses ``rules``.

Arrows: ``comparing``, ``places`` → ``groups`` → ``pieces`` → ``matching``, ``regions`` → ``parameters``, which knows
all wrappers, → ``shards``; ``groups`` → ``review``, ``rows``, ``plots`` → ``patterns``. A tensor is in one group, or
in ``pieces`` in several; ``regions`` tells which elements of it these are, and which of them a process holds.
"""
