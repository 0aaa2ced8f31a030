"""The life of an optimizer: rules in force in its steps, resuming by name, its lr schedulers. Uses ``groups``.

Arrows, of the step: ``building`` → ``in_force`` → ``checks``, ``telling`` → ``step_room`` → ``stepping`` → ``parting``
→ ``parts`` → ``seen``. A ``Parting`` tells what is to be stepped over (by ``layers`` of rules and λ from
``strengths``), a ``Stepping`` puts it in place and takes it away, a ``StepRoom`` is what hangs on the optimizers.
``holders`` finds the optimizers inside others, ``frames`` who is running, ``copies`` what a copy becomes.

Arrows, of resuming: ``resuming`` → ``saved_options`` → ``saved_states`` → ``unnamed``; ``lr_schedulers`` beside.
"""
