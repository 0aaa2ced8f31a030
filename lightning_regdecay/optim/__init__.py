"""The life of an optimizer: its steps, resuming by name, its lr schedulers. Uses ``groups`` and ``rules``.

Arrows: ``optimizers`` → ``resuming``, ``following`` → what they read and write.
"""
