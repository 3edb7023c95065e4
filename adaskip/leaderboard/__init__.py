"""Methods beside each other at equal measured time: plans, their losses, their times."""
