"""What the user writes: rules, the forms they come in and go out as, schedules, presets. Knows no model.

Arrows: ``exporting``, ``crossing`` → ``forms`` → ``factors``, ``presets``; ``factors`` → ``rules`` → ``selectors`` →
``schedules`` → ``names``, ``scalars``, ``plots``, ``formulas``, ``stages``; ``rules`` → ``regions``, ``toward``;
``presets`` → ``by_part``, ``muon`` → ``by_layer`` → ``scalars``.
"""
