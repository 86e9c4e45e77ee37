"""Teach one robot policy several jobs, one after another, without losing the earlier ones."""

import os

# Before torch is imported: OpenMP threads that wait for each other shall sleep, not spin. Where something else runs on
# the same cores, spinning made a training step of the small model sixty times slower; sleeping costs next to nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
