"""``bench sweep``: many cells (a defence, an attack, a rung, a seed), run in one process, a pool or a Ray cluster."""
