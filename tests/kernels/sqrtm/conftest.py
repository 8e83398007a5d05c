"""The hard covariances, under one import for every file of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
