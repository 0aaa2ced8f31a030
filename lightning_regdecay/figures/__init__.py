"""What is measured of a group, kept, and drawn. Uses ``groups`` and ``optim``.

Arrows: ``measuring`` → ``measures``, ``steps`` → ``norms``; ``history`` and ``plots`` beside.
"""
