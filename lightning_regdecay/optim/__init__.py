"""The life of an optimizer: rules in force in its steps, resuming by name, its lr schedulers. Uses ``groups``.

Arrows, of the step: ``building`` → ``in_force`` → ``checks``, ``telling`` → ``step_room`` → ``stepping`` → ``parting``
→ ``parts`` → ``seen``. A ``Parting`` tells what is to be stepped over (by ``layers`` of rules and λ from
``strengths``), a ``Stepping`` puts it in place and takes it away, a ``StepRoom`` is what hangs on the optimizers.
``holders`` finds the optimizers inside others, ``frames`` who is running, ``copies`` what a copy becomes.

Arrows, of what no param group can say: ``stepping`` → ``pulling`` → ``trial`` → ``by_element`` → ``decoupling``. There
λ is 0 in the group, and ``by_element`` decays parts of tensors, or toward what ``starts`` keeps; ``trial`` finds out
whether that is what the optimizer would have done.

Arrows, of resuming: ``resuming`` → ``saved_options`` → ``saved_states`` → ``unnamed``; ``lr_schedulers`` beside.
"""
