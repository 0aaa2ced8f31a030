"""What the user writes: rules, the forms they come in and go out as, schedules, presets. Knows no model.

Arrows: ``exporting``, ``crossing`` → ``forms`` → ``factors``, ``presets``; ``factors`` → ``rules`` → ``selectors`` →
``schedules`` → ``names``, ``scalars``, ``plots``, ``formulas``, ``stages``; ``presets`` → ``muon`` → ``by_layer`` →
``scalars``.
"""
