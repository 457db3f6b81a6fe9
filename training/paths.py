"""Where the training code keeps things; only NANO and LOGS are under version control."""

from pathlib import Path

TRAINING = Path(__file__).resolve().parent
REPOSITORY = TRAINING.parent
NANO = REPOSITORY / "dsv4" / "nano"
DATA = TRAINING / "data"
DOWNLOADS = DATA / "downloads"
PACKED = DATA / "packed"
RUNS = TRAINING / "runs"
LOGS = TRAINING / "logs"
FACTS_TABLE = TRAINING / "facts.tsv"
