"""Teach one robot policy several jobs, one after another, without losing the earlier ones."""

import os

# Before torch is imported: how long a thread of GNU OpenMP spins for the others before it sleeps. By default so
# long that a step of the small model, on two cores with something else running, took seconds instead of a tenth;
# with this it is as fast on free cores (231 against 227 samples/s) and shares busy ones (62 beside two busy loops).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
