"""What is measured of a group, kept, and drawn. Uses ``groups`` and ``optim``.

Arrows: ``measuring`` → ``measures``, ``steps`` → ``members`` → ``changes`` → ``norms``; ``history`` and ``plots``
beside.
"""
