"""Tests import the scripts from the folder above, and run on the CPU with one seed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
