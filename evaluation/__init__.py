"""From checkpoint files to records of AutoAttack: where they lie, what is evaluated, the attack, several at a time."""
