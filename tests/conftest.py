import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(2)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
