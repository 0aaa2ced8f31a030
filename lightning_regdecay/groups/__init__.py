"""Rules × the model as the user wrote it: parameters, matching, groups, comparing. Uses ``rules``.

Arrows: ``comparing``, ``places`` → ``groups`` → ``matching`` → ``parameters``, which knows all wrappers, → ``shards``;
``comparing``, ``groups`` → ``plots`` → ``patterns``.
"""
