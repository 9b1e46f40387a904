"""A small driving world with known physics, and a small base model of it."""

import os

# OpenMP threads that wait by spinning take the core from the one they wait for as soon as anything else runs on the
# machine: on two cores with one other busy process a training step then took 8 s instead of 0.5. Read once, when
# torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
