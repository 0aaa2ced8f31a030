"""Rules × the model as the user wrote it: parameters, matching, groups, comparing. Uses ``rules``.

Arrows: ``comparing`` → ``groups`` → ``matching`` → ``parameters``, which has all knowledge of wrappers and shards.
"""
